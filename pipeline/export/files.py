"""All files of a student, and what each is worth."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import xarray as xr

from pipeline import metrics
from pipeline.backbones import preprocessing
from pipeline.distillation.student_files import Student
from pipeline.errors import UserError
from pipeline.export import graphs, price, quantised

# Real chips on which a file is compared with torch.
COMPARED = 16


def write_exports(student: Student, told: Mapping, images: xr.Dataset, folder: Path, int8: bool, limit: int) -> dict:
    """Write a student's files to a folder.

    Args:
        told: its student.json.
        images: its data set, of whose validation split at most `limit` chips are scored.

    Returns:
        of torch and of every file: bytes, the score, and how far its logits are off.

    Raises:
        UserError: a file computes something else than the student, or the student is of other images.
    """
    _fits(told, images)
    chips = price.validation_chips(images, limit)
    seen = chips.image[:COMPARED]
    student = student.eval()
    program = graphs.trace(student, told)
    graphs.write_onnx(program, told, folder / "student.onnx")
    graphs.write_torch_program(program, told, folder / "student.pt2")
    said = {"torch": _worth(graphs.torch_predictor(student), chips, told, _bytes(student), 0.0)}
    for name in ("student.onnx", "student.pt2"):
        path, file = folder / name, graphs.load_predictor(folder / name)
        said[name] = _worth(file, chips, told, path.stat().st_size, graphs.check_exported(student, path, file, seen))
    if int8:
        path = folder / "student-int8.onnx"
        quantised.write_int8_onnx(folder / "student.onnx", path)
        file = graphs.load_predictor(path)
        said[path.name] = _worth(file, chips, told, path.stat().st_size, graphs.relative_logit_error(student, file, seen))
    return {
        "dataset": told["dataset"], "task": told["task"], "metric": metrics.METRICS[told["task"]],
        "architecture": told["architecture"], "chips": len(chips.image), "split": "val", "batch": price.BATCH,
        "tolerance": graphs.TOLERANCE, "files": said,
    }  # fmt: skip


def measure_throughputs(student: Student, folder: Path, image: np.ndarray) -> dict[str, float]:
    """Images a second of a student in torch and of each of its files in a folder, on this machine's processor.

    Args:
        image: real chips, (sample, band, y, x).
    """
    ways = {"torch": graphs.torch_predictor(student.eval())}
    ways |= {path.name: graphs.load_predictor(path) for path in sorted(folder.iterdir()) if path.suffix in (".onnx", ".pt2")}
    return {name: float(f"{price.throughput(logits, image.astype(np.float32)):.3g}") for name, logits in ways.items()}


def _worth(logits: Callable, chips: price.EvalSet, told: Mapping, size: int, found: float) -> dict:
    return {
        "bytes": size,
        "score": round(price.evaluate(logits, chips, told), 6),
        "difference": float(f"{found:.2g}"),
    }


def _bytes(student: Student) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in student.state_dict().values())


def _fits(told: Mapping, images: xr.Dataset) -> None:
    """Refuse images that are not those which the student was trained on, by what is known of both."""
    there = {
        "task": images.attrs["task"],
        "classes": list(images.attrs["classes"]),
        "units": images.attrs["units"],
        "size": [images.sizes["y"], images.sizes["x"]],
        "bands": [band.common_name for band in preprocessing.image_bands(images)],
    }
    said = {**told, "bands": [band["common_name"] for band in told["bands"]]}
    for name, value in there.items():
        if said[name] != value:
            raise UserError(
                f"The student has the {name} {said[name]}, and the images of {told['dataset']} have {value}. "
                "Train it again with: dvc repro distill"
            )
