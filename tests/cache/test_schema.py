"""The store as other software reads it: xarray, zarr-python, and the Zarr v3 specification."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray as xr
import zarr
from small_store import N_SAMPLES, all_values, file_bytes, open_store, small_schema, write_store

from cache.errors import StoreError
from cache.reader import FeatureStore
from cache.verify import verify
from cache.writer import write_skipped
from tests.errors import raises


def test_store_is_a_datatree_with_named_dimensions_and_coordinates(tmp_path):
    write_store(tmp_path)
    store = tmp_path / "store.zarr"
    tree = xr.open_datatree(store, engine="zarr")
    assert tree["level0"].features.dims == ("sample", "channel", "y", "x")
    assert tree["level0"].features.dtype == np.float16
    assert tree["level1"].attrs["stride"] == 8
    assert set(tree.coords) == {"sample", "split"}
    assert tree["level1"].sample.values.tolist()[:2] == ["s000", "s001"]
    assert tree["level1"].y.values.tolist() == [4, 12, 20, 28]
    assert tree["pooled"].mean_level1.shape == (N_SAMPLES, 7)
    expected = all_values(small_schema(), "level0/features").astype("float16")
    np.testing.assert_array_equal(tree["level0"].features, expected)
    # Levels can be interpolated to each other, since their cells have coordinates.
    fine = tree["level1"].features.astype("float32").interp(y=tree["level0"].y, x=tree["level0"].x)
    assert fine.shape[-2:] == (8, 8)
    # A level opens lazily, by sample or by shard.
    assert xr.open_zarr(store, group="level0", chunks={}).features.chunks[0][0] == 1
    assert xr.open_zarr(store, group="level0", chunks={"sample": 64}).features.chunks[0] == (64, 64, 22)


def test_views_are_a_dimension_with_names_and_the_contract_page_lists_every_array(tmp_path):
    schema = small_schema(samples=10, shard_size=4, codec="int8", views=("identity", "rot90"))
    features = open_store(tmp_path, schema)
    tree = xr.open_datatree(tmp_path / "store.zarr", engine="zarr")
    assert tree["level0"].features.dims == ("sample", "view", "channel", "y", "x")
    assert tree["pooled"].mean_level0.dims == ("sample", "view", "mean_level0_channel")
    rotated = tree["pooled"].mean_level0.sel(view="rot90")
    np.testing.assert_array_equal(rotated, all_values(schema, "pooled/mean_level0").astype("float16")[:, 1])
    arrays = {name for name, node in features.root.members(max_depth=None) if isinstance(node, zarr.Array)}
    level = {"features", "scale", "mean", "std", "y", "x"}
    assert arrays == {"sample", "split", "view", "pooled/mean_level0", "pooled/mean_level1"} | {
        f"level{index}/{name}" for index in range(2) for name in level
    }
    text = (Path(__file__).parents[2] / "cache/README.md").read_text()
    for name in (*level, "sample", "split", "view"):
        assert f"`{name}`" in text or f"/{name}`" in text, name


@pytest.mark.parametrize("codec", ["none", "zstd", "int8"])
def test_tensorstore_and_zarr_python_read_and_write_the_same_bytes(tmp_path, codec):
    """tensorstore is written in C++ and shares no code with zarr-python."""
    array = open_store(tmp_path, small_schema(codec=codec)).root["level1/features"]
    location = {"driver": "file", "path": str(tmp_path / "store.zarr/level1/features")}
    actual = tensorstore.open({"driver": "zarr3", "kvstore": location}).result().read().result()
    assert actual.dtype == array.dtype
    np.testing.assert_array_equal(actual, array[:])
    copy = zarr.create_array(
        tmp_path / "copy.zarr", shape=array.shape, dtype=array.dtype, chunks=array.chunks, shards=array.shards,
        compressors=array.compressors, fill_value=array.fill_value, config={"write_empty_chunks": True},
        chunk_key_encoding={"name": "default", "separator": "."},
    )  # fmt: skip
    copy[:] = array[:]
    # zarr-python writes the chunks of a shard in Morton order, which for one axis is their own order.
    expected, written = (file_bytes(tmp_path / name) for name in ("copy.zarr", "store.zarr/level1/features"))
    for name in ("c.0.0.0.0", "c.1.0.0.0", "c.2.0.0.0"):
        assert written[name] == expected[name]
    assert len(written) == len(expected) == 4  # with zarr.json


def test_skipped_store_states_the_reason(tmp_path):
    write_skipped(tmp_path / "x.zarr", tmp_path / "scratch", "requires nir")
    with raises(StoreError, key="skipped", value="requires nir", path=tmp_path / "x.zarr"):
        FeatureStore(tmp_path / "x.zarr")
    assert xr.open_datatree(tmp_path / "x.zarr", engine="zarr").attrs["skipped"] == "requires nir"
    assert "requires nir" in verify(tmp_path / "x.zarr")


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"split": ("train",)}, {"key": "split", "value": 1}),
        ({"sample": ("a",) * 150}, {"key": "sample", "value": "a"}),
        ({"views": ("identity", "identity")}, {"key": "views", "value": "identity"}),
        ({"split": ("",) * 150}, {"key": "split", "value": ""}),
        ({"sample": ("", *small_schema().sample[1:])}, {"key": "sample", "value": ""}),
        ({"dtype": "float64"}, {"key": "dtype", "value": "float64", "allowed": ("float16", "float32")}),
        ({"shard_size": 0}, {"key": "shard_size", "value": 0}),
        ({"pooled": {"mean": 0}}, {"key": "pooled/mean", "value": 0}),
        ({"levels": (replace(small_schema().levels[0], height=0),)}, {"key": "level0/features", "value": 0}),
        ({"sample": (), "split": ()}, {"key": "split", "value": 0}),
    ],
)
def test_schema_with_an_invalid_field_is_refused(change, fields):
    with raises(StoreError, **fields):
        replace(small_schema(), **change)
