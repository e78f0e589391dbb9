"""A student's graph as ONNX and as a program of torch.export, for any number of chips at once."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch

from pipeline.distillation.student_files import Student
from pipeline.errors import UserError
from pipeline.mapping.predictors import METADATA_KEY, open_session

# The greatest difference of any logit between the file and torch, as a share of the spread of torch's logits.
TOLERANCE = 1e-3
OPSET = 20
# What metadata tells of a student.
METADATA_KEYS = ("dataset", "task", "classes", "ignore", "bands", "units", "gsd", "size", "architecture", "variant", "weights",
        "teacher", "parameters", "input_size")  # fmt: skip


def trace(student: Student, told: Mapping) -> torch.export.ExportedProgram:
    """A student's graph, traced once for all files."""
    # Of one chip the number of chips would be taken for a constant.
    example = torch.zeros(2, len(told["bands"]), *told["size"])
    many = torch.export.Dim("batch", min=1, max=1 << 16)
    return torch.export.export(student, (example,), dynamic_shapes=({0: many},))


def write_onnx(program: torch.export.ExportedProgram, told: Mapping, path: Path) -> None:
    """Write a student as ONNX: input `chips` (batch, band, y, x), output `logits`, and what it is as metadata."""
    exported = torch.onnx.export(
        program, dynamo=True, input_names=["chips"], output_names=["logits"], opset_version=OPSET, verbose=False
    )
    model = exported.model_proto
    onnx.helper.set_model_props(model, onnx_metadata(told))
    model.doc_string = "A student of eo-compose; chips in the units and bands of the metadata"
    for node in model.graph.node:  # where each was traced from: paths of this machine
        del node.metadata_props[:]
        node.doc_string = ""
    # Shapes in between are inferred by whoever wants them; the exporter's are wrong after its own folding.
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.ClearField("doc_string")
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def onnx_metadata(told: Mapping) -> dict[str, str]:
    """What a file tells of its student, by name: all of it as JSON, and what a person looks for by itself."""
    bands = [band["common_name"] for band in told["bands"]]
    return {
        METADATA_KEY: json.dumps({name: told[name] for name in METADATA_KEYS if name in told}, sort_keys=True),
        "bands": ", ".join(bands),
        "units": told["units"],
        "classes": ", ".join(told["classes"]),
        "size": "x".join(map(str, told["size"])),
    }


def write_torch_program(program: torch.export.ExportedProgram, told: Mapping, path: Path) -> None:
    """Write a student as a program that torch.export.load reads; the metadata is in its `extra_files`."""
    torch.export.save(program, path, extra_files={f"{METADATA_KEY}.json": onnx_metadata(told)[METADATA_KEY]})


def load_predictor(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A file, loaded: from chips, float32 (batch, band, y, x), to what it says of them."""
    if path.suffix == ".pt2":
        return torch_predictor(torch.export.load(path).module())
    session = open_session(path)
    return lambda chips: session.run(None, {"chips": chips})[0]


def torch_predictor(network: torch.nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """The same of a network in torch."""

    @torch.inference_mode()
    def said(chips: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(chips)).numpy()

    return said


def relative_logit_error(student: Student, file: Callable[[np.ndarray], np.ndarray], chips: np.ndarray) -> float:
    """The greatest difference of a logit between a student and its file, as a share of the spread of its logits.

    Args:
        file: as `logits` loads it.
        chips: real ones, float32 (batch, band, y, x).
    """
    # Importing terratorch 1.2 lets convolutions run in bfloat16 in the whole process.
    torch.set_float32_matmul_precision("highest")
    wanted = torch_predictor(student)(chips)
    return float(np.abs(file(chips) - wanted).max() / max(wanted.std(), 1e-12))


def check_exported(student: Student, path: Path, file: Callable[[np.ndarray], np.ndarray], chips: np.ndarray) -> float:
    """The difference on real chips, one at a time and together, which must be below `TOLERANCE`.

    Raises:
        UserError: the file computes something else; it is removed.
    """
    found = max(relative_logit_error(student, file, chips), relative_logit_error(student, file, chips[:1]))
    if not found <= TOLERANCE:
        path.unlink()
        raise UserError(
            f"{path.name} differs from torch by {found:.2g} of the spread of the logits on real chips, more than "
            f"{TOLERANCE:g} allows. This network cannot be exported by torch {torch.__version__}; choose another."
        )
    return found
