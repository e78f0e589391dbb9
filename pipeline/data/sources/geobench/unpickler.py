"""Reading a pickle as data: nothing in it can run.

A pickle is a program, and the usual reader calls whatever it names. This one knows a short list of names, and what
they become here are plain records: not even numpy's own reader is called, which would unpickle objects within.
"""

import collections
import datetime
import io
import pickle
import re
from functools import cache

import numpy as np

from pipeline.errors import UserError

# Whatever is asked of these packages becomes a `Record`: their own code is never looked for.
_PACKAGES = ("geobench", "ccb")
_RECORDS = {("affine", "Affine"), ("rasterio.crs", "CRS"), ("rasterio._crs", "_CRS")}
_PLAIN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    **{("datetime", name): getattr(datetime, name) for name in ("date", "datetime", "time", "timedelta", "timezone")},
}
_NUMBERS = re.compile(r"[<>|=]?[biuf?][1248]?")


class StubObject:
    """Stands in for an object of another package.

    Attributes:
        args: what it was made with.
        state: what was set afterwards: attributes by name, or whatever its class pickles.
    """

    def __new__(cls, *args):
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state):
        self.state = state


class _Dtype:
    """A type of numbers, and of no objects."""

    def __init__(self, code, *_):
        if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
            raise UserError(f"it asks for an array of type {code!r:.60}; only numbers are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        if state[2:5] != (None, None, None):
            raise UserError("it asks for an array of records; only numbers are read")
        self.dtype = self.dtype.newbyteorder(state[1]) if state[1] in ("<", ">") else self.dtype


class _Array:
    """An array of numbers: `np.asarray` turns it into one."""

    def __init__(self, *_):
        self.values = np.empty(0)

    def __setstate__(self, state):
        _, shape, kind, by_column, data = state
        if not isinstance(kind, _Dtype) or not isinstance(data, bytes):
            raise UserError("it holds an array of objects; only numbers are read")
        self.values = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if by_column else "C")

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=dtype)


def _scalar(kind, data):
    if not isinstance(kind, _Dtype) or not isinstance(data, bytes):
        raise UserError("it holds a scalar object; only numbers are read")
    return np.frombuffer(data, kind.dtype)[0]


def _from_buffer(data, kind, shape, order):
    made = _Array()
    made.__setstate__((1, shape, kind, order == "F", bytes(data)))
    return made


_NUMPY = {("numpy", "dtype"): _Dtype, ("numpy", "ndarray"): _Array}
for _core in ("numpy.core", "numpy._core"):  # of numpy 1 and 2
    _NUMPY[_core + ".multiarray", "scalar"] = _scalar
    _NUMPY[_core + ".multiarray", "_reconstruct"] = _Array
    _NUMPY[_core + ".numeric", "_frombuffer"] = _from_buffer
_KNOWN = {**_PLAIN, **_NUMPY}
# What makes a tuple or a frozen set; in texts some of the same bytes are letters.
_TUPLES = (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.FROZENSET)
_MOST_TUPLES = 20_000


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if found := _KNOWN.get((module, name)):
            return found
        if module.split(".")[0] in _PACKAGES or (module, name) in _RECORDS:
            return _record(name)
        asked = f"{module}.{name}"
        asked = asked if asked.isprintable() and len(asked) < 200 else f"{asked!r:.200}"
        raise UserError(f"it asks for {asked}, which is no part of such data and may be an attack")


@cache
def _record(name: str) -> type:
    return type(name, (StubObject,), {})


def loads(data: bytes):
    """What a pickle holds, with records in place of foreign objects.

    Raises:
        UserError: it names anything that is not known here, or is damaged. Nothing in it was run.
    """
    # Not more than may be nested: Python looks into tuples within tuples by recursion, without a bound of its own.
    if sum(data.count(code) for code in _TUPLES) > _MOST_TUPLES:
        raise UserError("Its pickle is refused: it has more tuples than any such data. Nothing in it was run.")
    try:
        return _Reader(io.BytesIO(data)).load()
    except UserError as error:
        raise UserError(f"Its pickle is refused: {error}. Nothing in it was run.") from None
    except Exception as error:  # a damaged pickle may fail in any way
        raise UserError(f"Its pickle cannot be read ({type(error).__name__}: {error}).") from None
