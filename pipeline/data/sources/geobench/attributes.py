"""What a file of GEO-Bench says of itself: its pickle, read as data, and the label in it."""

import ast
import reprlib
from collections.abc import Mapping

import h5py
import numpy as np
from h5py import h5a, h5f

from pipeline.data.sources.geobench import unpickler
from pipeline.errors import UserError


def read_attributes(file: h5f.FileID) -> Mapping:
    """What a file says of itself, its pickle read without running it.

    Raises:
        UserError: it has none, or one that is damaged or refused.
    """
    try:
        data = ast.literal_eval(_text(file))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        data = None
    if not isinstance(data, bytes):
        raise UserError("it has no attribute 'pickle' that is the text of bytes, as GEO-Bench's files have")
    attributes = unpickler.loads(data)
    if not isinstance(attributes, dict):
        raise UserError("its attribute 'pickle' is no dictionary")
    return attributes


def _text(file: h5f.FileID) -> str | None:
    """The attribute 'pickle', if there is one and it is one text."""
    try:
        attribute = h5a.open(file, b"pickle")
    except KeyError:
        return None
    kind = attribute.dtype
    if attribute.shape != () or h5py.check_string_dtype(kind) is None:
        return None
    text = np.empty((), kind)
    attribute.read(text)
    return text[()].decode(errors="surrogateescape")


def as_integer_label(label) -> np.ndarray:
    """A label's whole numbers, one or a list.

    Raises:
        UserError: others.
    """
    parts = label if isinstance(label, list | tuple) else [label]
    if any(isinstance(one, list | tuple | dict | str | bytes) for one in parts):
        raise UserError(f"its label is {short_repr(label)}; labels are whole numbers")
    values = np.asarray(label)
    with np.errstate(invalid="ignore"):
        cast = values.astype(np.int64) if values.dtype.kind in "biuf" else None
    if cast is None or not np.array_equal(values, cast):
        raise UserError(f"its label is {short_repr(label)}; labels are whole numbers")
    return cast


def short_repr(what) -> str:
    """What an error, or a file, says, in a line of no great length."""
    return reprlib.repr(what) if not isinstance(what, Exception) else " ".join(str(what).split())[:300]
