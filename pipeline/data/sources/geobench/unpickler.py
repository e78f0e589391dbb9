"""Read a pickle as data, without running anything in it.

A pickle is a program: the standard unpickler calls whatever it names. This one accepts a short list of names, and
replaces objects of other packages by plain records. Even numpy's own functions are not called, since they would
unpickle nested objects.
"""

import collections
import io
import pickle
import re
from collections.abc import Callable

import numpy as np

from pipeline.errors import UserError

# Every name of these packages becomes a `StubObject`; they are never imported. The reader uses none of their objects.
STUBBED_PACKAGES = ("geobench", "ccb", "affine", "rasterio", "datetime")
_NUMERIC_DTYPE = re.compile(r"[<>|=]?[biuf?][1248]?")
# In texts some of these bytes are letters, so the count is an upper bound.
_TUPLE_OPCODES = (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.FROZENSET)
MAX_TUPLES = 20_000


class StubObject:
    """Placeholder without content for an object of another package."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


class _NumericDtype:
    """Placeholder for a numpy dtype; only numbers are accepted."""

    def __init__(self, code, *_):
        if not isinstance(code, str) or not _NUMERIC_DTYPE.fullmatch(code):
            raise UserError(f"it contains an array of type {code!r:.60}; only numbers are allowed", value=code)
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        if state[2:5] != (None, None, None):
            raise UserError("it contains a structured array; only numbers are allowed")
        self.dtype = self.dtype.newbyteorder(state[1]) if state[1] in ("<", ">") else self.dtype


class _NumericArray:
    """Placeholder for a numpy array of numbers; `np.asarray` converts it."""

    def __init__(self, *_):
        self.values = np.empty(0)

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, _NumericDtype) or not isinstance(data, bytes):
            raise UserError("it contains an array of objects; only numbers are allowed")
        self.values = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if is_fortran else "C")

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=dtype)


def _make_scalar(dtype, data):
    """Replacement of numpy's `scalar`."""
    if not isinstance(dtype, _NumericDtype) or not isinstance(data, bytes):
        raise UserError("it contains a scalar object; only numbers are allowed")
    return np.frombuffer(data, dtype.dtype)[0]


def _array_from_buffer(data, dtype, shape, order):
    """Replacement of numpy's `_frombuffer`."""
    array = _NumericArray()
    array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
    return array


_ALLOWED: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "dtype"): _NumericDtype,
    ("numpy", "ndarray"): _NumericArray,
}
for _core in ("numpy.core", "numpy._core"):  # of numpy 1 and 2
    _ALLOWED[_core + ".multiarray", "scalar"] = _make_scalar
    _ALLOWED[_core + ".multiarray", "_reconstruct"] = _NumericArray
    _ALLOWED[_core + ".numeric", "_frombuffer"] = _array_from_buffer


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if allowed := _ALLOWED.get((module, name)):
            return allowed
        if module.split(".")[0] in STUBBED_PACKAGES:
            return StubObject
        full_name = f"{module}.{name}"
        # Escape control characters, which could reach the terminal.
        shown = full_name if full_name.isprintable() and len(full_name) < 200 else f"{full_name!r:.200}"
        message = f"it names {shown}, which does not belong in such a file and may be an attack"
        raise UserError(message, value=full_name)


def loads(data: bytes):
    """Unpickle data with `StubObject`s in place of objects of other packages. Nothing in the pickle runs.

    Raises UserError: the pickle names anything else, or is damaged.
    """
    # CPython recurses into nested tuples without a limit and would crash; the count limits the nesting.
    if sum(data.count(opcode) for opcode in _TUPLE_OPCODES) > MAX_TUPLES:
        message = f"The attribute 'pickle' is refused: it has more than {MAX_TUPLES} tuples. Nothing in it was run."
        raise UserError(message, key="pickle")
    try:
        return _SafeUnpickler(io.BytesIO(data)).load()
    except UserError as error:
        message = f"The attribute 'pickle' is refused: {error}. Nothing in it was run."
        raise UserError(message, key="pickle", value=error.value) from None
    except Exception as error:  # a damaged pickle can fail in any way
        message = f"The attribute 'pickle' is not a readable pickle ({type(error).__name__}: {error})."
        raise UserError(message, key="pickle") from None
