"""int8 by dynamic quantisation: weights stored as int8, activations quantised as they come."""

import logging
from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic


def write_int8_onnx(path: Path, final: Path) -> None:
    """Write an exported student with int8 weights (one scale a channel), its metadata kept.

    Weights are quantised once, activations by each batch's own range, so no calibration images are needed
    (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
    """
    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)  # it advises a pass over the graph that the exporter has already made
    try:
        quantize_dynamic(path, final, weight_type=QuantType.QInt8, per_channel=True)
    finally:
        logger.setLevel(level)
