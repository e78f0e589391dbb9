"""The unpickler runs no attack, and reads everything that GEO-Bench's pickles contain."""

import collections
import datetime
import functools
import os
import pickle
import subprocess

import affine
import numpy as np
import pytest
from rasterio.crs import CRS

from pipeline.data.sources.geobench import unpickler
from pipeline.errors import UserError
from tests import geobench_files
from tests.errors import raises
from tests.pipeline.data.sources.geobench.conftest import Call


def attacks(sentinel: str) -> dict:
    """Objects whose pickles create or read the file `sentinel`, by description."""
    command = f"touch {sentinel}"
    inner = Call(os.system, command)
    object_array = np.empty(1, dtype=object)
    object_array[0] = inner
    return {
        "os.system": inner,
        "builtins.eval": Call(eval, f"__import__('os').system('{command}')"),
        "builtins.exec": Call(exec, f"open('{sentinel}', 'w')"),
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


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", list(attacks("x")))
def test_unpickler_attack_is_refused_and_runs_nothing(tmp_path, name, protocol):
    sentinel = tmp_path / "ran"
    data = pickle.dumps(attacks(str(sentinel))[name], protocol=protocol)
    with raises(UserError, key="pickle"):
        unpickler.loads(data)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'touch {}'\ntR.",  # protocol 0
        b"\x80\x04\x8c\x02nt\x8c\x06system\x93\x8c\x08touch {}\x85R.",
        b"\x80\x02cgeobench.dataset\nos\nq\x00(S'touch {}'\ntR.)R.",
        b"\x80\x02\x82\x01.",  # extension code
        b"\x80\x02Pos.system\n.",  # persistent ID
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"",
        b"\x80\x04.",
    ],
)
def test_unpickler_handwritten_pickle_runs_nothing(tmp_path, data):
    sentinel = tmp_path / "ran"
    try:
        loaded = unpickler.loads(data.replace(b"{}", str(sentinel).encode()))
    except UserError:
        loaded = None
    assert loaded is None or isinstance(loaded, unpickler.StubObject)
    assert not sentinel.exists()


def test_unpickler_metadata_of_the_released_files_is_read():
    data = geobench_files.dumps(
        {
            "label": np.array([0, 1, 1]),
            "04 - Red": {
                "band_info": ("Sentinel2", "04 - Red"),
                "date": datetime.date(2019, 1, 1),
                "spatial_resolution": np.float64(10),
                "transform": affine.Affine(10, 0, 5, 0, -10, 7),
                "crs": CRS.from_epsg(32634),
            },
        }
    )
    assert b"numpy.core" in data
    assert b"numpy._core" not in data
    attributes = unpickler.loads(data)
    np.testing.assert_array_equal(attributes["label"], [0, 1, 1])
    assert attributes["04 - Red"]["spatial_resolution"] == 10
    assert isinstance(attributes["04 - Red"]["crs"], unpickler.StubObject)


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
