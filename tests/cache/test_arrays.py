"""Rows as they are stored, with every codec, and files that are not as they should be."""

import os

import numpy as np
import pytest
import zarr
from small_store import layout, write

from cache.errors import StoreError
from cache.reader import FeatureStore
from cache.schema import StoreSchema

INDEX = np.array([149, 0, 64, 63, 7, 149])
CODECS = ("none", "lz4", "zstd", "bitround6", "int8")


def through_zarr(path, name):
    """The whole array by zarr-python alone."""
    root = zarr.open_group(path, mode="r")
    values = root[name][:]
    if values.dtype == np.int8:
        values = (values * root[name.replace("features", "scale")][:][..., None, None]).astype(root.attrs["dtype"])
    return values


@pytest.mark.parametrize("views", [(), ("identity", "flip_x", "rot90")], ids=["plain", "views"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_are_those_that_zarr_python_reads(tmp_path, codec, dtype, views):
    write(tmp_path, layout(dtype=dtype, codec=codec, views=views))
    features = FeatureStore(tmp_path / "store.zarr")
    for name in ("level0/features", "level1/features", "pooled/mean_level1"):
        expected = through_zarr(tmp_path / "store.zarr", name)[INDEX]
        for number, view in enumerate(views or (None,)):
            read = features.read(name, INDEX, view)
            assert read.dtype == dtype
            np.testing.assert_array_equal(read, expected[:, number] if views else expected)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_every_value_of_a_lossless_codec_comes_back(tmp_path, dtype, codec):
    """Every float16 there is, NaNs' payloads and signed zeros included."""
    words = np.arange(2**16, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):
        given = words if dtype == "float16" else words.astype(np.float32) * np.float32(1.1)
    described = StoreSchema(
        sample=tuple(f"s{i}" for i in range(64)), split=("train",) * 64, pooled={}, dtype=dtype, shard_size=64,
        levels=(layout().levels[0].__class__(16, 8, 8, 4, "a"),), codec=layout(codec=codec).codec,
    )  # fmt: skip
    maps = given.reshape(64, 16, 8, 8)
    with np.errstate(all="ignore"):
        write(tmp_path, described, given=lambda *_: {"level0/features": maps})
    read = FeatureStore(tmp_path / "store.zarr").read("level0/features", np.arange(64))
    assert read.tobytes() == maps.tobytes()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("length", [0, 3, 1000])
def test_a_cut_file_is_named(tmp_path, codec, length):
    write(tmp_path, layout(codec=codec))
    file = tmp_path / "store.zarr/level0/features/c.1.0.0.0"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(StoreError, match=r"level0/features/c.1.0.0.0 of .* is damaged.*cache.verify"):
        FeatureStore(tmp_path / "store.zarr").read("level0/features", [120])


def test_a_missing_shard_is_an_error_and_not_nan(tmp_path):
    write(tmp_path)
    (tmp_path / "store.zarr/pooled/mean_level0/c.2.0").unlink()
    with pytest.raises(StoreError, match=r"pooled/mean_level0/c.2.0 is missing"):
        FeatureStore(tmp_path / "store.zarr").read("pooled/mean_level0", [140])


def test_reads_wait_for_the_disk_where_the_system_cannot_say_so(tmp_path, monkeypatch):
    """As on macOS, and on file systems without RWF_NOWAIT."""
    write(tmp_path)
    features = FeatureStore(tmp_path / "store.zarr")
    expected = features.read("level0/features", INDEX)
    monkeypatch.setattr(os, "RWF_NOWAIT", 1 << 30)  # a flag that no kernel knows
    np.testing.assert_array_equal(features.read("level0/features", INDEX), expected)
    monkeypatch.delattr(os, "RWF_NOWAIT")
    np.testing.assert_array_equal(features.read("level0/features", INDEX), expected)
