"""Export of students to ONNX (float32 or int8 weights) and torch.export, for any batch size.

The input is a batch of chips in the units of the images store: normalisation and resize are in the graph, and bands,
units, classes and size are in the file's metadata. Every file is checked against torch, scored on real chips, and
timed.
"""

import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
import xarray as xr
from onnxruntime.quantization import QuantType, quantize_dynamic

from pipeline.data.image_store import image_bands
from pipeline.distillation.student import Student
from pipeline.errors import UserError
from pipeline.mapping.predictors import METADATA_KEY, open_session
from pipeline.tasks import get_task

# Function from chips, float32 (batch, band, y, x), to logits (batch, class, …).
LogitsFunction = Callable[[np.ndarray], np.ndarray]

# Largest allowed difference of a logit between a file and torch, divided by the standard deviation of torch's logits.
TOLERANCE = 1e-3
OPSET = 20
# Upper bound of the batch size in the exported graphs.
MAX_BATCH = 1 << 16
# Number of real chips on which a file is compared with torch.
N_COMPARED = 16
# Chips per batch when files are scored and timed, and number of timed batches.
BATCH, N_TIMED_BATCHES = 16, 5
# Keys of student.json that are written to exported files.
EXPORTED_KEYS = (
    "dataset", "task", "classes", "ignore", "bands", "units", "gsd", "size", "architecture", "variant", "weights",
    "teacher", "parameters", "input_size",
)  # fmt: skip


@dataclass(frozen=True)
class EvalSet:
    """Real chips and their labels.

    Attributes:
        image: float32 (sample, band, y, x).
        label: class index (sample,), multi-hot (sample, class) or mask (sample, y, x).
    """

    image: np.ndarray
    label: np.ndarray


# Export


def write_exports(
    student: Student, metadata: Mapping, images: xr.Dataset, folder: Path, int8: bool, max_chips: int
) -> dict:
    """Write the files of a student, check them against torch, and score them.

    Args:
        student: on the CPU.
        metadata: its student.json.
        images: the images store of its dataset.
        folder: for student.onnx, student.pt2 and, on request, student-int8.onnx.
        int8: whether to write ONNX with int8 weights too.
        max_chips: number of chips of the validation split to score on.

    Returns:
        A description of the export; under `files`, by file name and for `torch`: size in bytes, score, and the
        difference of the logits from torch.

    Raises:
        UserError: the logits of a file differ from the student's, or the student is for other images.
    """
    _check_images(metadata, images)
    eval_set = load_eval_set(images, max_chips)
    compared = eval_set.image[:N_COMPARED]
    student = student.eval()
    program = trace(student, metadata)
    onnx_path, torch_path, int8_path = (
        folder / name for name in ("student.onnx", "student.pt2", "student-int8.onnx")
    )
    write_onnx(program, metadata, onnx_path)
    write_torch_program(program, metadata, torch_path)
    files = {"torch": _summary(torch_predictor(student), eval_set, metadata, _n_bytes(student), 0.0)}
    for path in (onnx_path, torch_path):
        predict = load_predictor(path)
        error = check_exported(student, path, predict, compared)
        files[path.name] = _summary(predict, eval_set, metadata, path.stat().st_size, error)
    if int8:
        write_int8_onnx(onnx_path, int8_path)
        predict = load_predictor(int8_path)
        error = relative_logit_error(student, predict, compared)
        files[int8_path.name] = _summary(predict, eval_set, metadata, int8_path.stat().st_size, error)
    return {
        "dataset": metadata["dataset"], "task": metadata["task"], "metric": get_task(metadata["task"]).metric,
        "architecture": metadata["architecture"], "chips": len(eval_set.image), "split": "val", "batch": BATCH,
        "tolerance": TOLERANCE, "files": files,
    }  # fmt: skip


def _summary(predict: LogitsFunction, eval_set: EvalSet, metadata: Mapping, n_bytes: int, error: float) -> dict:
    return {
        "bytes": n_bytes,
        "score": round(evaluate(predict, eval_set, metadata), 6),
        "difference": float(f"{error:.2g}"),
    }


def _n_bytes(student: Student) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in student.state_dict().values())


def _check_images(metadata: Mapping, images: xr.Dataset) -> None:
    """Refuse an images store whose task, classes, units, size or bands differ from the student's."""
    expected = {**metadata, "bands": [band["common_name"] for band in metadata["bands"]]}
    actual = {
        "task": images.attrs["task"],
        "classes": list(images.attrs["classes"]),
        "units": images.attrs["units"],
        "size": [images.sizes["y"], images.sizes["x"]],
        "bands": [band.common_name for band in image_bands(images)],
    }
    for name, value in actual.items():
        if expected[name] != value:
            raise UserError(
                f"The {name} of the student: {expected[name]}. The {name} of the images of {metadata['dataset']}: "
                f"{value}. Train the student again: dvc repro distill",
                key=name,
                value=expected[name],
                allowed=value if isinstance(value, list) else [value],
            )


# Files


def trace(student: Student, metadata: Mapping) -> torch.export.ExportedProgram:
    """Trace a student's graph once, for all files."""
    # With an example of one chip, torch would treat the batch size as a constant.
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
    logger.setLevel(logging.ERROR)  # onnxruntime recommends an optimisation that the exporter has already applied
    try:
        quantize_dynamic(path, int8_path, weight_type=QuantType.QInt8, per_channel=True)
    finally:
        logger.setLevel(level)


# Checks against torch


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
    """Check the logits of an exported file against the student's, for a batch and for one chip.

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


# Scores and throughput


def load_eval_set(images: xr.Dataset, max_chips: int) -> EvalSet:
    """Load the first `max_chips` chips of the validation split and their labels."""
    rows = np.flatnonzero(images.split.values == "val")[:max_chips]
    return EvalSet(images.image[rows].values.astype(np.float32), images.label[rows].values)


def evaluate(predict: LogitsFunction, eval_set: EvalSet, metadata: Mapping) -> float:
    """Compute the task's metric, in [0, 1].

    Args:
        predict: computes logits.
        eval_set: chips and labels.
        metadata: the student's student.json.
    """
    starts = range(0, len(eval_set.image), BATCH)
    logits = np.concatenate([predict(eval_set.image[start : start + BATCH]) for start in starts])
    task = get_task(metadata["task"])(len(metadata["classes"]))
    counts = task.counts(task.predict(logits), eval_set.label.astype(np.int64))
    return float(task.score(counts.sum(axis=0)))


def measure_throughputs(student: Student, folder: Path, image: np.ndarray) -> dict[str, float]:
    """Measure images per second on this machine's CPU, of a student in torch and of each of its files.

    Args:
        student: on the CPU.
        folder: with its exported files.
        image: real chips (sample, band, y, x).

    Returns:
        Images per second by file name, and for `torch`; three significant digits.
    """
    predictors = {"torch": torch_predictor(student.eval())}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".onnx", ".pt2"):
            predictors[path.name] = load_predictor(path)
    chips = image.astype(np.float32)
    return {name: float(f"{throughput(predict, chips):.3g}") for name, predict in predictors.items()}


def throughput(predict: LogitsFunction, image: np.ndarray) -> float:
    """Measure images per second: the median of several batches after a warm-up.

    Args:
        predict: computes logits.
        image: chips, float32 (sample, band, y, x), repeated to fill a batch.
    """
    batch = np.resize(image, (BATCH, *image.shape[1:]))
    timings = []
    for _ in range(N_TIMED_BATCHES + 1):
        start = time.perf_counter()
        predict(batch)
        timings.append(time.perf_counter() - start)
    return BATCH / statistics.median(timings[1:])
