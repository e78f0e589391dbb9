"""The files of an exported student: written, scored on real chips, and timed."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from pipeline.data.image_store import image_bands
from pipeline.distillation.student import Student
from pipeline.errors import UserError
from pipeline.export import graphs
from pipeline.export.graphs import LogitsFunction
from pipeline.tasks import get_task

# Number of real chips on which a file is compared with torch.
N_COMPARED = 16
# Chips per batch when files are scored and timed, and number of timed batches.
BATCH, N_TIMED_BATCHES = 16, 5


@dataclass(frozen=True)
class EvalSet:
    """Real chips and their labels.

    Attributes:
        image: float32 (sample, band, y, x).
        label: class index (sample,), multi-hot (sample, class) or mask (sample, y, x).
    """

    image: np.ndarray
    label: np.ndarray


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
        UserError: a file does not compute what the student computes, or the student is for other images.
    """
    _check_images(metadata, images)
    eval_set = load_eval_set(images, max_chips)
    compared = eval_set.image[:N_COMPARED]
    student = student.eval()
    program = graphs.trace(student, metadata)
    onnx_path, torch_path, int8_path = (
        folder / name for name in ("student.onnx", "student.pt2", "student-int8.onnx")
    )
    graphs.write_onnx(program, metadata, onnx_path)
    graphs.write_torch_program(program, metadata, torch_path)
    files = {"torch": _summary(graphs.torch_predictor(student), eval_set, metadata, _n_bytes(student), 0.0)}
    for path in (onnx_path, torch_path):
        predict = graphs.load_predictor(path)
        error = graphs.check_exported(student, path, predict, compared)
        files[path.name] = _summary(predict, eval_set, metadata, path.stat().st_size, error)
    if int8:
        graphs.write_int8_onnx(onnx_path, int8_path)
        predict = graphs.load_predictor(int8_path)
        error = graphs.relative_logit_error(student, predict, compared)
        files[int8_path.name] = _summary(predict, eval_set, metadata, int8_path.stat().st_size, error)
    return {
        "dataset": metadata["dataset"], "task": metadata["task"], "metric": get_task(metadata["task"]).metric,
        "architecture": metadata["architecture"], "chips": len(eval_set.image), "split": "val", "batch": BATCH,
        "tolerance": graphs.TOLERANCE, "files": files,
    }  # fmt: skip


def measure_throughputs(student: Student, folder: Path, image: np.ndarray) -> dict[str, float]:
    """Measure images per second on this machine's CPU, of a student in torch and of each of its files.

    Args:
        student: on the CPU.
        folder: with its exported files.
        image: real chips (sample, band, y, x).

    Returns:
        Images per second by file name, and for `torch`; three significant digits.
    """
    predictors = {"torch": graphs.torch_predictor(student.eval())}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".onnx", ".pt2"):
            predictors[path.name] = graphs.load_predictor(path)
    chips = image.astype(np.float32)
    return {name: float(f"{throughput(predict, chips):.3g}") for name, predict in predictors.items()}


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
