"""int8 by dynamic quantisation: weights stored as int8, activations quantised as they come."""

import logging
import tempfile
from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process


def int8_file(path: Path, final: Path) -> None:
    """Write an exported student with int8 weights (one scale a channel), its metadata kept.

    Weights are quantised once, activations by each batch's own range, so no calibration images are needed
    (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
    """
    logging.getLogger().setLevel(logging.ERROR)  # it warns of what `quant_pre_process` has already done
    with tempfile.TemporaryDirectory(dir=final.parent) as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_dynamic(prepared, final, weight_type=QuantType.QInt8, per_channel=True)
