"""The unpickler runs no attack, and reads everything that GEO-Bench's pickles contain."""

import collections
import functools
import os
import pickle
import subprocess

import numpy as np
import pytest

from pipeline.data.sources.geobench import unpickler
from pipeline.errors import UserError
from tests.errors import raises
from tests.pipeline.data.sources.geobench.conftest import Call


def attacks(sentinel: str) -> dict[str, bytes]:
    """Pickles that create or read the file `sentinel`, by description."""
    command = f"touch {sentinel}"
    inner = Call(os.system, command)
    object_array = np.empty(1, dtype=object)
    object_array[0] = inner
    attacks = {
        "os.system": inner,
        "builtins.eval": Call(eval, f"__import__('os').system('{command}')"),
        "builtins.getattr": Call(getattr, Call(__import__, "os"), "system"),
        "subprocess": Call(subprocess.check_call, ["touch", sentinel]),
        "functools.partial": Call(functools.reduce, functools.partial(os.system), [command], 0),
        "nested in a label": {"label": [1, (2, {"x": inner})]},
        "nested in an OrderedDict": collections.OrderedDict(a=[inner]),
        "numpy array of objects": object_array,
        "numpy scalar object": Call(np._core.multiarray.scalar, np.dtype("O"), pickle.dumps(inner)),
        "numpy masked array": np.ma.MaskedArray([1, 2]),
        "numpy structured array with objects": np.zeros(1, [("a", "O")]),
        "numpy.load": Call(np.load, sentinel),
        "pickle in a pickle": Call(pickle.loads, pickle.dumps(inner)),
    }
    pickles = {name: pickle.dumps(attack, protocol=5) for name, attack in attacks.items()}
    handwritten = {
        "protocol 0": b"cos\nsystem\n(S'touch {}'\ntR.",
        "another system": b"\x80\x04\x8c\x02nt\x8c\x06system\x93\x8c\x08touch {}\x85R.",
        "a stub is called": b"\x80\x02cgeobench.dataset\nos\n(S'touch {}'\ntR(S'system'\ntR.",
        "extension code": b"\x80\x02\x82\x01.",
        "persistent ID": b"\x80\x02Pos.system\n.",
        "large frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    }
    return pickles | {name: data.replace(b"{}", sentinel.encode()) for name, data in handwritten.items()}


@pytest.mark.parametrize("name", attacks("x"))
def test_unpickler_attack_is_refused_and_runs_nothing(tmp_path, name):
    sentinel = tmp_path / "ran"
    with raises(UserError, key="pickle"):
        unpickler.loads(attacks(str(sentinel))[name])
    assert not sentinel.exists()


@pytest.mark.parametrize("dtype", ["<i8", ">f4", "u1", "?"])
def test_unpickler_numeric_arrays_are_read(dtype):
    values = np.arange(12).reshape(3, 4).astype(dtype)
    for protocol in (3, 4, 5):
        for array in (values, np.asfortranarray(values)):
            np.testing.assert_array_equal(unpickler.loads(pickle.dumps(array, protocol=protocol)), values)
        assert unpickler.loads(pickle.dumps(values[1, 2], protocol=protocol)) == values[1, 2]


def test_unpickler_texts_with_the_bytes_of_tuple_opcodes_are_read():
    data = {"notes": ["t" * 9000, ("a", ("b", ("c",)))]}
    assert unpickler.loads(pickle.dumps(data)) == data


@pytest.mark.parametrize("module", ["geobench", "geobench.io.dataset", "ccb.io.dataset", "geobench.label"])
def test_unpickler_older_module_names_of_geobench_are_read(module):
    data = f"c{module}\nSentinel2\n)\x81}}(S'name'\nS'02 - Blue'\nub.".encode("latin1")
    assert isinstance(unpickler.loads(b"\x80\x02" + data), unpickler.StubObject)
