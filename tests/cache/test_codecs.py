"""Errors and sizes of each codec on real maps: Sentinel-2 bands."""

import numpy as np
import pytest
import zarr
from small_store import write_store

from cache.codecs import parse_codec
from cache.errors import StoreError
from cache.reader import FeatureStore
from cache.schema import LevelSchema, StoreSchema
from tests.errors import raises


@pytest.fixture(scope="module")
def maps(image_dataset):
    """(sample, band, y, x) float32, around zero as features are."""
    image = image_dataset("sample-landuse-seg").image[:40].astype("float32")
    return (image - image.mean((0, 2, 3), keepdims=True)) / image.std((0, 2, 3), keepdims=True)


@pytest.fixture
def stored(maps, tmp_path):
    """Write maps with a codec; returns the store and the bytes of its level."""

    def store(codec, dtype="float16", values=maps):
        schema = StoreSchema(
            sample=tuple(f"s{i}" for i in range(len(values))), split=("train",) * len(values), pooled={},
            shard_size=16, levels=(LevelSchema(*values.shape[1:], 1, "bands"),), codec=parse_codec(codec, dtype),
            dtype=dtype,
        )  # fmt: skip
        folder = tmp_path / f"{codec}-{dtype}"

        def make_values(schema, shard, seed):
            return {"level0/features": values[schema.rows(shard)]}

        write_store(folder, schema, make_values=make_values)
        features = FeatureStore(folder / "store.zarr")
        size = sum(file.stat().st_size for file in (folder / "store.zarr/level0/features").iterdir())
        return features, size

    return store


def test_relative_error_is_the_error_of_what_is_read(stored, maps):
    stated = {}
    for codec in ("none", "zstd", "bitround8", "bitround4", "int8"):
        features, _ = stored(codec)
        actual = features.read("level0/features", np.arange(len(maps))).astype("float64")
        measured = np.sqrt(np.square(actual - maps).sum() / np.square(maps.astype("float64")).sum())
        stated[codec] = features.root["level0"].attrs["relative_error"]
        assert stated[codec] == pytest.approx(measured, rel=0.03)
    assert 0 < stated["none"] == stated["zstd"] < stated["bitround8"] < stated["bitround4"]
    assert stated["none"] < 2**-11
    assert stated["bitround8"] < 2**-9
    assert stated["bitround4"] < 2**-5
    assert stated["int8"] < 0.02
    exact, _ = stored("zstd", "float32")
    assert exact.root["level0"].attrs["relative_error"] == 0


def test_lossy_codecs_save_space(stored):
    size = {codec: stored(codec)[1] for codec in ("none", "lz4", "zstd", "bitround4", "int8")}
    assert size["bitround4"] < size["zstd"] <= size["lz4"] < size["none"]
    assert size["int8"] < 0.51 * size["none"]


def test_int8_scale_is_per_map_and_channel(stored, maps):
    """Neither a large sample nor a large channel may round the others to zero."""
    uneven = maps[:20].copy()
    uneven[3] *= 1000
    uneven[:, 2] *= 100
    features, _ = stored("int8", "float32", uneven)
    actual = features.read("level0/features", np.arange(20))
    error = np.abs(actual - uneven).max((2, 3)) / np.abs(uneven).max((2, 3))
    assert error.max() < 0.5 / 127 * 1.01


@pytest.mark.parametrize("nonfinite", [np.nan, np.inf])
def test_int8_refuses_nonfinite_values(stored, maps, nonfinite):
    values = maps[:20].copy()
    values[7, 3, 2, 1] = nonfinite
    with raises(StoreError, "level0/features", key="extract.codec", value="int8"):
        stored("int8", "float32", values)


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd", "bitround4"])
def test_nonfinite_values_pass_through_other_codecs(stored, maps, codec):
    values = maps[:20].copy()
    values[3, 1, 2, :4] = np.nan, np.inf, -np.inf, 65504
    features, _ = stored(codec, values=values)
    np.testing.assert_array_equal(
        features.read("level0/features", [3])[0, 1, 2, :4], np.array([np.nan, np.inf, -np.inf, 65504], "float16")
    )
    assert np.isfinite(features.root["level0"].attrs["relative_error"])


def test_int8_channel_of_zeros_stays_zero(stored, maps):
    values = maps[:20].copy()
    values[:, 5] = 0
    features, _ = stored("int8", values=values)
    assert not features.read("level0/features", np.arange(20))[:, 5].any()


def test_int8_at_both_ends_of_the_range(stored):
    """No infinity from the largest values, and no wrong sign from the smallest."""
    values = np.random.default_rng(0).uniform(-1, 1, (20, 13, 8, 8)).astype("float32")
    is_subnormal = np.arange(20) % 5 == 0
    values[~is_subnormal] *= np.finfo("float32").max
    values[is_subnormal] *= 1e-44
    features, _ = stored("int8", "float32", values)
    actual = features.read("level0/features", np.arange(20))
    assert np.isfinite(actual).all()
    large = np.abs(values) > 1e38
    assert np.abs(actual[large] / values[large] - 1).max() < 0.02
    assert (np.sign(actual) * np.sign(values) >= 0).all()


def test_zarr_metadata_has_the_compressor(stored):
    features, _ = stored("lz4")
    assert zarr.open_group(features.location)["level0/features"].compressors[0].cname.value == "lz4"


@pytest.mark.parametrize(
    ("name", "dtype", "mentions"),
    [
        ("gzip", "float16", ["gzip", "none", "lz4", "zstd", "bitround", "int8"]),
        ("bitround", "float16", ["'bitround'"]),
        ("bitround11", "float16", ["bitround11", "float16", "10"]),
        ("bitround0", "float32", ["bitround0", "float32", "23"]),
    ],
)
def test_parse_codec_of_an_unknown_name_states_what_there_is(name, dtype, mentions):
    with raises(ValueError, *mentions):
        parse_codec(name, dtype)
