"""A student as ONNX, as ONNX with int8 weights, and as a torch.export program; any batch size."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from pipeline.distillation.student import Student
from pipeline.errors import UserError
from pipeline.mapping.predictors import METADATA_KEY, open_session

# Function from chips, float32 (batch, band, y, x), to logits (batch, class, …).
LogitsFunction = Callable[[np.ndarray], np.ndarray]

# Largest allowed difference of a logit between a file and torch, divided by the standard deviation of torch's logits.
TOLERANCE = 1e-3
OPSET = 20
# Upper bound of the batch size in the exported graphs.
MAX_BATCH = 1 << 16
# Keys of student.json that are written to exported files.
EXPORTED_KEYS = (
    "dataset", "task", "classes", "ignore", "bands", "units", "gsd", "size", "architecture", "variant", "weights",
    "teacher", "parameters", "input_size",
)  # fmt: skip


def trace(student: Student, metadata: Mapping) -> torch.export.ExportedProgram:
    """Trace a student's graph once, for all files."""
    # With an example of one chip, torch would take the batch size for a constant.
    example = torch.zeros(2, len(metadata["bands"]), *metadata["size"])
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    return torch.export.export(student, (example,), dynamic_shapes=({0: batch},))


def write_onnx(program: torch.export.ExportedProgram, metadata: Mapping, path: Path) -> None:
    """Write a student as ONNX with input `chips` (batch, band, y, x), output `logits`, and its metadata."""
    exported = torch.onnx.export(
        program, dynamo=True, input_names=["chips"], output_names=["logits"], opset_version=OPSET, verbose=False
    )
    model = exported.model_proto
    onnx.helper.set_model_props(model, onnx_metadata(metadata))
    model.doc_string = "A student of eo-compose; chips in the units and bands of the metadata"
    for node in model.graph.node:  # the exporter writes paths of this machine into both fields
        del node.metadata_props[:]
        node.doc_string = ""
    # The exporter's shapes of intermediate values are wrong after its own constant folding; readers infer them.
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.ClearField("doc_string")
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def onnx_metadata(metadata: Mapping) -> dict[str, str]:
    """Return the properties of an ONNX file: all metadata as JSON, and the main entries as readable text."""
    return {
        METADATA_KEY: json.dumps({key: metadata[key] for key in EXPORTED_KEYS if key in metadata}, sort_keys=True),
        "bands": ", ".join(band["common_name"] for band in metadata["bands"]),
        "units": metadata["units"],
        "classes": ", ".join(metadata["classes"]),
        "size": "x".join(map(str, metadata["size"])),
    }


def write_torch_program(program: torch.export.ExportedProgram, metadata: Mapping, path: Path) -> None:
    """Write a student as a program for torch.export.load; its metadata is in `extra_files`."""
    torch.export.save(program, path, extra_files={f"{METADATA_KEY}.json": onnx_metadata(metadata)[METADATA_KEY]})


def write_int8_onnx(path: Path, int8_path: Path) -> None:
    """Write an exported student with int8 weights (one scale per channel) and the same metadata.

    Dynamic quantisation: weights are quantised once, activations by the range of each batch, so no calibration images
    are needed (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
    """
    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)  # onnxruntime recommends a graph optimisation that the exporter has already done
    try:
        quantize_dynamic(path, int8_path, weight_type=QuantType.QInt8, per_channel=True)
    finally:
        logger.setLevel(level)


def load_predictor(path: Path) -> LogitsFunction:
    """Load an exported file as a function from chips, float32 (batch, band, y, x), to logits."""
    if path.suffix == ".pt2":
        return torch_predictor(torch.export.load(path).module())
    session = open_session(path)
    return lambda chips: session.run(None, {"chips": chips})[0]


def torch_predictor(network: torch.nn.Module) -> LogitsFunction:
    """Return a torch network on the CPU as a function from chips, float32 (batch, band, y, x), to logits."""

    @torch.inference_mode()
    def predict(chips: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(chips)).numpy()

    return predict


def relative_logit_error(student: Student, predict: LogitsFunction, chips: np.ndarray) -> float:
    """Return the largest difference of a logit from torch's, in standard deviations of torch's logits.

    Args:
        student: on the CPU, in evaluation mode.
        predict: the exported student, from `load_predictor`.
        chips: real chips, float32 (batch, band, y, x).
    """
    # Importing terratorch 1.2 lets convolutions run in bfloat16 in the whole process.
    torch.set_float32_matmul_precision("highest")
    expected = torch_predictor(student)(chips)
    return float(np.abs(predict(chips) - expected).max() / max(expected.std(), 1e-12))


def check_exported(student: Student, path: Path, predict: LogitsFunction, chips: np.ndarray) -> float:
    """Check that an exported file computes what the student computes, for a batch and for one chip.

    Args:
        student, predict, chips: as for `relative_logit_error`.
        path: the exported file.

    Returns:
        The relative error, at most `TOLERANCE`.

    Raises:
        UserError: the error is larger or not finite; the file is deleted.
    """
    error = max(relative_logit_error(student, predict, chips), relative_logit_error(student, predict, chips[:1]))
    if not error <= TOLERANCE:
        path.unlink()
        raise UserError(
            f"The logits of {path.name} differ from torch's by {error:.2g} of their standard deviation on real "
            f"chips. The limit is {TOLERANCE:g}. torch {torch.__version__} cannot export it; choose another.",
            key="students.network",
            value=error,
            path=path,
        )
    return error
