"""An exported student as a predictor: onnxruntime and nothing of torch."""

import hashlib
import json
import os
from pathlib import Path

import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, InvalidProtobuf

from pipeline.errors import UserError
from pipeline.mapping.signature import Predictor, parse_signature

# The key of the file's metadata under which a student is described.
METADATA_KEY = "eo_compose"


def load_onnx_student(path: Path) -> Predictor:
    """The student in an ONNX file.

    Raises:
        UserError: no such file, or one that is no exported student.
    """
    path = Path(path)
    session = open_session(path)
    said = session.get_modelmeta().custom_metadata_map
    if METADATA_KEY not in said:
        raise UserError(
            f"{path} does not say which bands and classes it has (metadata '{METADATA_KEY}'): no student that stages.export "
            "has written."
        )
    try:
        told = json.loads(said[METADATA_KEY])
    except ValueError:
        told = None
    signature = parse_signature(told, str(path))
    (given,) = session.get_inputs()

    def logits(chips, known):
        return session.run(None, {given.name: chips})[0]

    return Predictor(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), signature, logits)


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """A session on the processors that this process may use.

    Raises:
        UserError: no such file, or no ONNX file.
    """
    if not path.exists():
        raise UserError(f"There is no exported student at {path}. Export one with: python -m stages.export")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    # Memory is not kept for the next batch: tiles are many, and a map's memory is to stay small.
    options.enable_cpu_mem_arena = False
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except (Fail, InvalidGraph, InvalidProtobuf) as error:
        raise UserError(f"{path} cannot be read as ONNX: {' '.join(str(error).split())}") from None
