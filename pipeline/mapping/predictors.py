"""Models that map scenes: their inputs and outputs, and exported students, which run without torch."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, InvalidProtobuf

from cache import checksums
from pipeline.bands import Band
from pipeline.errors import UserError
from pipeline.tasks import Task, get_task

# Key of a student's metadata in an ONNX file.
METADATA_KEY = "eo_compose"


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a model; chips have these bands, in order, in units of pipeline/bands.py."""

    task: type[Task]
    class_names: tuple[str, ...]
    bands: tuple[Band, ...]
    units: str
    gsd: float  # in metres; NaN if unknown
    size: tuple[int, int]  # (y, x) in pixels
    metadata_keys: tuple[str, ...] = ()  # other inputs: `location`, `time`


@dataclass(frozen=True)
class Predictor:
    """A loaded model.

    Attributes:
        digest: SHA-256 of everything that its predictions depend on.
        predict_logits: a function from chips, float32 (batch, band, y, x), and metadata to logits, float32 (batch,
            class) or (batch, class, y, x). The metadata are `location` (batch, 2), latitude and longitude of the
            chips' centres in degrees, and `time` (batch,), UTC, datetime64[s].
    """

    name: str
    digest: str
    signature: Signature
    predict_logits: Callable[[np.ndarray, Mapping[str, np.ndarray]], np.ndarray]


def parse_signature(metadata: Mapping, path: Path | str) -> Signature:
    """Read a signature from the metadata of a student, and refuse incomplete or invalid ones."""

    def float_or_nan(value: float | None) -> float:
        return math.nan if value is None else float(value)

    try:
        bands = tuple(
            Band(band["name"], band["common_name"], float_or_nan(band["wavelength"])) for band in metadata["bands"]
        )
        task, class_names, units = metadata["task"], tuple(metadata["classes"]), metadata["units"]
        gsd, size = float_or_nan(metadata["gsd"]), tuple(map(int, metadata["size"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"The metadata of {path} are incomplete or invalid ({error!r}). Export the student again.",
            key=error.args[0] if isinstance(error, KeyError) else None, path=path,
        ) from None  # fmt: skip
    if len(size) != 2:
        raise UserError(f"The metadata of {path}: a size is [y, x] in pixels.", key="size", value=size, path=path)
    return Signature(get_task(str(task), f"The task of {path}"), class_names, bands, units, gsd, size)


def load_onnx_student(path: Path) -> Predictor:
    """Load an exported student from an ONNX file; refuse other files."""
    session = open_session(path)
    properties = session.get_modelmeta().custom_metadata_map
    if METADATA_KEY not in properties:
        raise UserError(
            f"{path} has no metadata '{METADATA_KEY}' with its bands and classes: it was not written by "
            "stages.export. Export a student with: python -m stages.export",
            key=METADATA_KEY, path=path,
        )  # fmt: skip
    try:
        metadata = json.loads(properties[METADATA_KEY])
    except ValueError:
        metadata = {}
    (model_input,) = session.get_inputs()

    def predict_logits(chips, _):
        return session.run(None, {model_input.name: chips})[0]

    return Predictor(path.name, checksums.digest(path), parse_signature(metadata, path), predict_logits)


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """Open an ONNX file on the CPU cores that this process may use; refuse other files."""
    if not path.exists():
        raise UserError(
            f"There is no exported student at {path}. Export one with: python -m stages.export", path=path
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    # The arena holds memory between batches; a map has many tiles and its memory must stay small.
    options.enable_cpu_mem_arena = False
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except (Fail, InvalidGraph, InvalidProtobuf) as error:
        raise UserError(f"{path} is not a readable ONNX file: {' '.join(str(error).split())}", path=path) from None
