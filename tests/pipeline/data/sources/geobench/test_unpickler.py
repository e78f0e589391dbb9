"""Real attacks: none runs, and all that GEO-Bench wrote is still read."""

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


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.how = function, args

    def __reduce__(self):
        return self.how


def attacks(sentinel: str) -> dict:
    command = f"touch {sentinel}"
    inner = Calls(os.system, command)
    hidden = np.empty(1, dtype=object)
    hidden[0] = inner
    return {
        "os.system": inner,
        "builtins.eval": Calls(eval, f"__import__('os').system('{command}')"),
        "builtins.exec": Calls(exec, f"open('{sentinel}', 'w')"),
        "builtins.getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "subprocess": Calls(subprocess.check_call, ["touch", sentinel]),
        "functools.partial": Calls(functools.reduce, functools.partial(os.system), [command], 0),
        "nested in a label": {"label": [1, (2, {"x": inner})]},
        "nested in an ordered dictionary": collections.OrderedDict(a=[inner]),
        "numpy, an array of objects": hidden,
        "numpy, a scalar object": Calls(np._core.multiarray.scalar, np.dtype("O"), pickle.dumps(inner)),
        "numpy, a masked array": np.ma.MaskedArray([1, 2]),
        "numpy, a type of objects in a record": np.zeros(1, [("a", "O")]),
        "numpy, its loader": Calls(np.load, sentinel),
        "the pickle within": Calls(pickle.loads, pickle.dumps(inner)),
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", list(attacks("x")))
def test_an_attack_is_refused_and_runs_nothing(tmp_path, name, protocol):
    sentinel = tmp_path / "ran"
    data = pickle.dumps(attacks(str(sentinel))[name], protocol=protocol)
    with pytest.raises(UserError, match="Its pickle is refused: .*Nothing in it was run"):
        unpickler.loads(data)
    assert not sentinel.exists()


def test_the_attacks_are_real(tmp_path):
    sentinel = tmp_path / "ran"
    pickle.loads(pickle.dumps(attacks(str(sentinel))["os.system"]))
    assert sentinel.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'touch {}'\ntR.",  # by hand, in the oldest protocol
        b"\x80\x04\x8c\x02nt\x8c\x06system\x93\x8c\x08touch {}\x85R.",
        b"\x80\x02cgeobench.dataset\nos\nq\x00(S'touch {}'\ntR.)R.",
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x02Pos.system\n.",  # a persistent name
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"",
        b"\x80\x04.",
    ],
)
def test_pickles_written_by_hand(tmp_path, data):
    sentinel = tmp_path / "ran"
    try:
        found = unpickler.loads(data.replace(b"{}", str(sentinel).encode()))
    except UserError:
        found = None
    assert found is None or isinstance(found, unpickler.StubObject)
    assert not sentinel.exists()


def test_what_the_files_hold_is_read():
    day = datetime.date(2019, 1, 1)
    made = geobench_files.dumps(
        {
            "label": np.array([0, 1, 1]),
            "04 - Red": {
                "band_info": ("Sentinel2", "04 - Red"),
                "date": day,
                "spatial_resolution": np.float64(10),
                "transform": affine.Affine(10, 0, 5, 0, -10, 7),
                "crs": CRS.from_epsg(32634),
            },
        }
    )
    assert b"numpy.core" in made
    assert b"numpy._core" not in made
    found = unpickler.loads(made)
    np.testing.assert_array_equal(found["label"], [0, 1, 1])
    band = found["04 - Red"]
    assert band["date"] == day
    assert band["spatial_resolution"] == 10
    assert band["transform"].args == (10, 0, 5, 0, -10, 7)
    assert "32634" in band["crs"].state
    assert type(band["band_info"]).__name__ == "Sentinel2"
    assert band["band_info"].state["name"] == "04 - Red"


@pytest.mark.parametrize("kind", ["<i8", ">f4", "u1", "?"])
def test_arrays_of_numbers_are_read(kind):
    values = np.arange(12).reshape(3, 4).astype(kind)
    for protocol in (3, 4, 5):
        for each in (values, np.asfortranarray(values)):
            np.testing.assert_array_equal(unpickler.loads(pickle.dumps(each, protocol=protocol)), values)
        assert unpickler.loads(pickle.dumps(values[1, 2], protocol=protocol)) == values[1, 2]


@pytest.mark.parametrize("module", ["geobench", "geobench.io.dataset", "ccb.io.dataset", "geobench.label"])
def test_older_names_of_geobench_are_known(module):
    data = f"c{module}\nSentinel2\n)\x81}}(S'name'\nS'02 - Blue'\nub.".encode("latin1")
    assert unpickler.loads(b"\x80\x02" + data).state == {"name": "02 - Blue"}
