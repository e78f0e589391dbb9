"""Export of students to ONNX (float32 or int8 weights) and torch.export, for any batch size.

The input is a batch of chips in the units of the images store: normalisation and resize are in the graph, and bands,
units, classes and size are in the file's metadata. Every file is checked against torch, scored on real chips, and
timed.
"""

import json
import logging
import statistics
import timeit
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
import xarray as xr
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
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
# Keys of student.json that are not written to exported files: the graph contains their values.
NOT_EXPORTED_KEYS = ("mean", "std")


# Export


def write_exports(
    student: Student, metadata: Mapping, images: xr.Dataset, folder: Path, int8: bool, max_chips: int
) -> dict:
    """Write student.onnx, student.pt2 and, with `int8`, student-int8.onnx; check and score them.

    Args:
        student: on the CPU.
        metadata: its student.json.
        images: the images store of its dataset.
        folder: for the files.
        max_chips: number of chips of the validation split to score on.

    Returns:
        A description of the export; under `files`, by file name and for `torch`: size in bytes, score, and the
        difference of the logits from torch.

    Raises:
        UserError: the logits of a file differ from the student's, or the student is for other images.
    """
    _check_images(metadata, images)
    validation = images.isel(sample=np.flatnonzero(images.split.values == "val")[:max_chips])
    chips, label = validation.image.values.astype(np.float32), validation.label.values.astype(np.int64)
    compared, task = chips[:N_COMPARED], get_task(metadata["task"])(len(metadata["classes"]))

    def summary(predict: LogitsFunction, size: int, error: float) -> dict:
        logits = np.concatenate([predict(chips[start : start + BATCH]) for start in range(0, len(chips), BATCH)])
        score = float(task.score(task.counts(task.predict(logits), label).sum(axis=0)))
        return {"bytes": size, "score": round(score, 6), "difference": float(f"{error:.2g}")}

    student = student.eval()
    program = trace(student, metadata)
    write_onnx(program, metadata, folder / "student.onnx")
    torch.export.save(
        program, folder / "student.pt2", extra_files={f"{METADATA_KEY}.json": onnx_metadata(metadata)[METADATA_KEY]}
    )
    files = {"torch": summary(torch_predictor(student), n_bytes(student), 0.0)}
    for path in (folder / "student.onnx", folder / "student.pt2"):
        predict = load_predictor(path)
        error = check_exported(student, path, predict, compared)
        files[path.name] = summary(predict, path.stat().st_size, error)
    if int8:
        path = folder / "student-int8.onnx"
        write_int8_onnx(folder / "student.onnx", path)
        predict = load_predictor(path)
        error = relative_logit_error(student, predict, compared)
        files[path.name] = summary(predict, path.stat().st_size, error)
    return {
        "dataset": metadata["dataset"], "task": metadata["task"], "metric": task.metric,
        "architecture": metadata["architecture"], "chips": len(chips), "split": "val", "batch": BATCH,
        "tolerance": TOLERANCE, "files": files,
    }  # fmt: skip


def n_bytes(network: torch.nn.Module) -> int:
    """Return the size of a network's parameters and buffers in bytes."""
    return sum(tensor.nbytes for tensor in network.state_dict().values())


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
                key=name, value=expected[name], allowed=value if isinstance(value, list) else [value],
            )  # fmt: skip


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
    ClearMetadataAndDocStringPass()(exported.model)  # the exporter writes paths of this machine
    model = exported.model_proto
    # The exporter's shapes of intermediate values are wrong after its own constant folding; readers infer them.
    del model.graph.value_info[:]
    onnx.helper.set_model_props(model, onnx_metadata(metadata))
    model.doc_string = "A student of eo-compose; chips in the units and bands of the metadata"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def onnx_metadata(metadata: Mapping) -> dict[str, str]:
    """Return the properties of an ONNX file: all metadata as JSON, and the main entries as readable text."""
    return {
        METADATA_KEY: json.dumps(
            {key: value for key, value in metadata.items() if key not in NOT_EXPORTED_KEYS}, sort_keys=True
        ),
        "bands": ", ".join(band["common_name"] for band in metadata["bands"]),
        "units": metadata["units"],
        "classes": ", ".join(metadata["classes"]),
        "size": "x".join(map(str, metadata["size"])),
    }


def write_int8_onnx(path: Path, int8_path: Path) -> None:
    """Write an exported student with int8 weights (one scale per channel) and the same metadata.

    Dynamic quantisation needs no calibration images: activations are quantised by the range of each batch
    (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
    """
    logging.disable(logging.WARNING)  # onnxruntime recommends an optimisation that the exporter has already applied
    try:
        quantize_dynamic(path, int8_path, weight_type=QuantType.QInt8, per_channel=True)
    finally:
        logging.disable(logging.NOTSET)


# Checks against torch


def load_predictor(path: Path) -> LogitsFunction:
    """Load an exported file."""
    if path.suffix == ".pt2":
        return torch_predictor(torch.export.load(path).module())
    session = open_session(path)
    return lambda chips: session.run(None, {"chips": chips})[0]


def torch_predictor(network: torch.nn.Module) -> LogitsFunction:
    """Wrap a torch network on the CPU."""

    @torch.inference_mode()
    def predict(chips: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(chips)).numpy()

    return predict


def relative_logit_error(student: Student, predict: LogitsFunction, chips: np.ndarray) -> float:
    """Return the largest difference of a logit from torch's, in standard deviations of torch's logits."""
    # Importing terratorch 1.2 lets convolutions run in bfloat16 in the whole process.
    torch.set_float32_matmul_precision("highest")
    expected = torch_predictor(student)(chips)
    return float(np.abs(predict(chips) - expected).max() / max(expected.std(), 1e-12))


def check_exported(student: Student, path: Path, predict: LogitsFunction, chips: np.ndarray) -> float:
    """Return the error of an exported file, for a batch and for one chip; delete and refuse a wrong file."""
    error = max(relative_logit_error(student, predict, chips), relative_logit_error(student, predict, chips[:1]))
    if not error <= TOLERANCE:
        path.unlink()
        raise UserError(
            f"The logits of {path.name} differ from torch's by {error:.2g} of their standard deviation on real "
            f"chips. The limit is {TOLERANCE:g}. torch {torch.__version__} cannot export it; choose another.",
            key="students.network", value=error, path=path,
        )  # fmt: skip
    return error


# Throughput


def measure_throughputs(student: Student, folder: Path, image: np.ndarray) -> dict[str, float]:
    """Measure images per second on this machine's CPU, of a student in torch and of each of its files.

    Args:
        student: on the CPU.
        folder: with its exported files.
        image: real chips (sample, band, y, x), repeated to fill a batch.

    Returns:
        Images per second by file name, and for `torch`: medians of several batches, of three significant digits.
    """
    predictors = {"torch": torch_predictor(student.eval())}
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".onnx", ".pt2")]
    predictors |= {path.name: load_predictor(path) for path in files}
    batch, throughputs = np.resize(image.astype(np.float32), (BATCH, *image.shape[1:])), {}
    for name, predict in predictors.items():
        seconds = timeit.repeat(partial(predict, batch), number=1, repeat=N_TIMED_BATCHES + 1)
        throughputs[name] = float(f"{BATCH / statistics.median(seconds[1:]):.3g}")
    return throughputs
