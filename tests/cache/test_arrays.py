"""Rows of every codec, damaged files, and limits on open and mapped files."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from small_store import all_values, open_store, small_schema, write_store

from cache import arrays
from cache.errors import StoreError
from cache.reader import FeatureStore
from cache.schema import LevelSchema
from tests.errors import raises

INDEX = np.array([149, 0, 64, 63, 7, 149])


def read_with_zarr(path, name):
    """The whole array by zarr-python alone."""
    root = zarr.open_group(path, mode="r")
    values = root[name][:]
    if values.dtype == np.int8:
        values = (values * root[name.replace("features", "scale")][:][..., None, None]).astype(root.attrs["dtype"])
    return values


@pytest.mark.parametrize("views", [(), ("identity", "flip_x", "rot90")], ids=["plain", "views"])
@pytest.mark.parametrize(
    ("codec", "dtype"), [("none", "float32"), ("lz4", "float16"), ("zstd", "float32"), ("int8", "float16")]
)
def test_read_equals_zarr_python(tmp_path, codec, dtype, views):
    features = open_store(tmp_path, small_schema(samples=20, shard_size=8, dtype=dtype, codec=codec, views=views))
    for name in ("level0/features", "level1/features", "pooled/mean_level1"):
        index = [19, 0, 8, 7, 19]
        expected = read_with_zarr(tmp_path / "store.zarr", name)[index]
        for number, view in enumerate(views or (None,)):
            actual = features.read(name, index, view)
            assert actual.dtype == dtype
            np.testing.assert_array_equal(actual, expected[:, number] if views else expected)


@pytest.mark.parametrize(("codec", "dtype"), [("none", "float16"), ("lz4", "float32"), ("zstd", "float16")])
def test_read_with_a_lossless_codec_returns_every_value(tmp_path, dtype, codec):
    """All float16 values, including the payloads of NaN and signed zeros."""
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):
        values = values if dtype == "float16" else values.astype(np.float32) * np.float32(1.1)
    schema = replace(small_schema(dtype, 64, codec=codec), levels=(LevelSchema(16, 8, 8, 4, "a"),), pooled={})
    maps = values.reshape(64, 16, 8, 8)
    with np.errstate(all="ignore"):
        features = open_store(tmp_path, schema, make_values=lambda *_: {"level0/features": maps})
    assert features.read("level0/features", np.arange(64)).tobytes() == maps.tobytes()


@pytest.mark.parametrize(("codec", "lengths"), [("none", (1000, 0)), ("zstd", (1000, 3)), ("int8", (1000,))])
def test_read_from_a_truncated_or_missing_file_names_it(tmp_path, codec, lengths):
    write_store(tmp_path, small_schema(codec=codec))
    store, name = tmp_path / "store.zarr", "level0/features/c.1.0.0.0"
    for length in lengths:
        (store / name).write_bytes((store / name).read_bytes()[:length])
        with raises(StoreError, name, "cache.verify", value=name, path=store):
            FeatureStore(store).read("level0/features", [120])
    (store / "pooled/mean_level0/c.2.0").unlink()
    with raises(StoreError, value="pooled/mean_level0/c.2.0", path=store):
        FeatureStore(store).read("pooled/mean_level0", [140])


def test_read_on_a_system_without_rwf_nowait_gives_the_same(tmp_path, monkeypatch):
    features = open_store(tmp_path)
    expected = features.read("level0/features", INDEX)
    monkeypatch.setattr(os, "RWF_NOWAIT", 1 << 30)  # a flag that no kernel knows
    np.testing.assert_array_equal(features.read("level0/features", INDEX), expected)
    monkeypatch.delattr(os, "RWF_NOWAIT")  # as on macOS
    np.testing.assert_array_equal(features.read("level0/features", INDEX), expected)


def test_read_from_more_files_than_may_be_open_closes_some(tmp_path, monkeypatch):
    schema, order = small_schema(samples=40, shard_size=2), np.random.default_rng(0).permutation(40)
    features = open_store(tmp_path, schema)
    monkeypatch.setattr(arrays, "max_open_files", lambda: 6)
    expected = all_values(schema, "level0/features").astype("float16")[order]
    np.testing.assert_array_equal(features.read("level0/features", order), expected)
    assert 1 <= sum(map(len, features._folder.files.values())) <= 6


def test_read_beyond_max_mapped_bytes_releases_pages(tmp_path, monkeypatch):
    features = open_store(tmp_path, small_schema(samples=3000, shard_size=500))
    monkeypatch.setattr(arrays, "MAX_MAPPED_BYTES", 0)
    features.read("level0/features", np.arange(3000))
    features.read("level0/features", [7, 2222])
    mappings = re.findall(r"level0/features/c\..*?\nRss: +(\d+) kB", Path("/proc/self/smaps").read_text(), re.DOTALL)
    resident = sum(map(int, mappings)) * 1024
    size = sum(path.stat().st_size for path in (tmp_path / "store.zarr/level0/features").glob("c.*"))
    assert size > 1_900_000
    assert resident < size / 2  # two rows, and what the system maps around them


def test_read_from_a_replaced_store_fails(tmp_path):
    features = open_store(tmp_path)
    features.read("level0/features", [0])
    shutil.rmtree(tmp_path / "store.zarr")
    write_store(tmp_path, seed=1)
    with raises(StoreError, value="level0/features/c.2.0.0.0", path=tmp_path / "store.zarr"):
        features.read("level0/features", [140])
