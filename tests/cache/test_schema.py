"""The store as others see it: xarray, zarr-python, and the Zarr v3 specification."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray as xr
import zarr
from small_store import SAMPLES, everything, layout, write

from cache.reader import FeatureStore
from cache.writer import write_skipped


def test_the_store_is_a_datatree_with_named_dimensions_and_coordinates(tmp_path):
    write(tmp_path)
    tree = xr.open_datatree(tmp_path / "store.zarr", engine="zarr")
    assert tree["level0"].features.dims == ("sample", "channel", "y", "x")
    assert tree["level0"].features.dtype == np.float16
    assert tree["level1"].attrs["stride"] == 8
    assert set(tree.coords) == {"sample", "split"}
    assert tree["level1"].sample.values.tolist()[:2] == ["s000", "s001"]
    assert tree["level1"].y.values.tolist() == [4, 12, 20, 28]
    assert tree["pooled"].mean_level1.shape == (SAMPLES, 7)
    np.testing.assert_array_equal(tree["level0"].features, everything(layout(), "level0/features").astype("float16"))
    # Levels meet where they lie in the image, since their cells have coordinates.
    fine = tree["level1"].features.astype("float32").interp(y=tree["level0"].y, x=tree["level0"].x)
    assert fine.shape[-2:] == (8, 8)


def test_a_level_opens_lazily(tmp_path):
    write(tmp_path)
    lazy = xr.open_zarr(tmp_path / "store.zarr", group="level0", chunks={})
    assert lazy.features.chunks[0][0] == 1
    by_shard = xr.open_zarr(tmp_path / "store.zarr", group="level0", chunks={"sample": 64})
    assert by_shard.features.chunks[0] == (64, 64, 22)
    means = [store.features.astype("float32").mean("sample").compute() for store in (by_shard, lazy)]
    np.testing.assert_allclose(*means, atol=1e-6)


def test_views_are_a_dimension_with_names(tmp_path):
    described = layout(samples=10, shard=4, views=("identity", "rot90"))
    write(tmp_path, described)
    tree = xr.open_datatree(tmp_path / "store.zarr", engine="zarr")
    assert tree["level0"].features.dims == ("sample", "view", "channel", "y", "x")
    assert tree["pooled"].mean_level0.dims == ("sample", "view", "mean_level0_channel")
    turned = tree["level0"].features.sel(view="rot90")
    np.testing.assert_array_equal(turned, everything(described, "level0/features").astype("float16")[:, 1])


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd", "bitround6", "int8"])
def test_a_reader_in_another_language_gets_the_same_values(tmp_path, codec):
    """tensorstore is C++ and shares nothing with zarr-python."""
    write(tmp_path, layout(codec=codec))
    location = {"driver": "file", "path": str(tmp_path / "store.zarr/level1/features")}
    theirs = tensorstore.open({"driver": "zarr3", "kvstore": location}).result().read().result()
    ours = zarr.open_group(tmp_path / "store.zarr", mode="r")["level1/features"][:]
    assert theirs.dtype == ours.dtype
    np.testing.assert_array_equal(theirs, ours)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_shard_is_byte_for_byte_what_zarr_python_writes(tmp_path, codec):
    write(tmp_path, layout(codec=codec))
    array = zarr.open_group(tmp_path / "store.zarr", mode="r")["level1/features"]
    theirs = zarr.create_array(
        tmp_path / "theirs.zarr", shape=array.shape, dtype=array.dtype, chunks=array.chunks, shards=array.shards,
        compressors=array.compressors, fill_value=float("nan"), config={"write_empty_chunks": True},
        chunk_key_encoding={"name": "default", "separator": "."},
    )  # fmt: skip
    theirs[:] = array[:]
    # zarr-python lays a full shard's chunks down in Morton order, which for one axis is their own.
    for shard in range(3):
        name = f"c.{shard}.0.0.0"
        assert (tmp_path / "theirs.zarr" / name).read_bytes() == (
            tmp_path / "store.zarr/level1/features" / name
        ).read_bytes()


def test_one_file_a_shard(tmp_path):
    write(tmp_path)
    folder = tmp_path / "store.zarr/level0/features"
    assert sorted(path.name for path in folder.iterdir()) == ["c.0.0.0.0", "c.1.0.0.0", "c.2.0.0.0", "zarr.json"]


def test_a_left_out_store_says_why(tmp_path):
    write_skipped(tmp_path / "x.zarr", tmp_path / "scratch", "needs nir")
    with pytest.raises(Exception, match="holds no features: needs nir"):
        FeatureStore(tmp_path / "x.zarr")
    assert xr.open_datatree(tmp_path / "x.zarr", engine="zarr").attrs["skipped"] == "needs nir"


def test_the_contract_page_names_every_array(tmp_path):
    """What cache/README.md promises is what lies there, and nothing else."""
    write(tmp_path, layout(codec="int8", views=("identity", "flip_x")))
    metadata = json.loads((tmp_path / "store.zarr/zarr.json").read_text())["consolidated_metadata"]["metadata"]
    arrays = {name for name, node in metadata.items() if node["node_type"] == "array"}
    level = {"features", "scale", "mean", "std", "y", "x"}
    assert arrays == {"sample", "split", "view", "pooled/mean_level0", "pooled/mean_level1"} | {
        f"level{index}/{name}" for index in range(2) for name in level
    }
    text = (Path(__file__).parents[2] / "cache/README.md").read_text()
    for name in (*level, "sample", "split", "view"):
        assert f"`{name}`" in text or f"/{name}`" in text, name
