"""Students: compact networks of timm with any number of input bands, saved as tensors and a JSON file beside them."""

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import torch

from cache.atomic import write_file
from pipeline.backbones.checkpoints import load_strict, read_checkpoint
from pipeline.distillation.student import Student, StudentSpec
from pipeline.errors import UserError

TENSORS_FILE, METADATA_FILE = "student.pt", "student.json"
# What student.json says of every student, beside what `save` adds.
METADATA_KEYS = (
    "dataset", "task", "classes", "ignore", "bands", "units", "gsd", "size", "variant", "weights", "teacher",
)  # fmt: skip


def save_student(folder: Path, student: Student, told: Mapping) -> None:
    """Write a student's tensors (student.pt) and, last, what it is (student.json).

    Args:
        told: dataset, task, classes (names), ignore (a label's value, or None), bands (dictionaries of name,
            common_name and wavelength in micrometres, in the input's order), units, gsd in metres, size [y, x] of its
            chips in pixels, variant of training, weights (`pretrained` or `random`), teacher (a model or None); and
            anything else that JSON can hold.

    Raises:
        ValueError: `told` lacks one of these.
    """
    if lacking := [key for key in METADATA_KEYS if key not in told]:
        raise ValueError(f"a student is saved with {', '.join(lacking)}")
    shape, held = student.shape, BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in student.state_dict().items()}, held)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / TENSORS_FILE, [held.getbuffer()])
    written = {
        **told,
        "architecture": shape.architecture,
        "input_size": shape.input_size,
        "parameters": sum(one.numel() for one in student.parameters()),
        "mean": student.mean.flatten().tolist(),
        "std": student.std.flatten().tolist(),
    }
    write_file(folder / METADATA_FILE, [(json.dumps(written, indent=1, sort_keys=True) + "\n").encode()])


def load_student(folder: Path) -> tuple[Student, dict]:
    """A saved student, on the processor and ready to predict, and its student.json.

    Raises:
        UserError: nothing there, or files that are damaged or do not belong together.
    """
    try:
        told = json.loads((folder / METADATA_FILE).read_text())
        shape = StudentSpec(
            told["architecture"], len(told["bands"]), len(told["classes"]), told["task"], told["input_size"]
        )
        moments = told["mean"], told["std"]
    except FileNotFoundError:
        raise UserError(f"There is no student in {folder} (no {METADATA_FILE}). Run: dvc repro distill") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / METADATA_FILE} does not describe a student ({error!r}). Run: dvc repro distill") from None
    if not (folder / TENSORS_FILE).exists():
        raise UserError(f"There is no {folder / TENSORS_FILE}, the tensors of this student. Run: dvc repro distill")
    with torch.random.fork_rng(devices=[]):
        student = Student(shape, *moments)
    load_strict(student, read_checkpoint(folder / TENSORS_FILE), folder / TENSORS_FILE)
    return student.eval(), told


__all__ = ["Student", "StudentSpec", "load_student", "save_student"]
