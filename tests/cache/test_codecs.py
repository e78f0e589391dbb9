"""Errors and sizes of each codec on smooth maps around zero, as features are."""

from dataclasses import replace

import numpy as np
import pytest
from small_store import open_store, small_schema

from cache.errors import StoreError
from cache.schema import LevelSchema
from tests.errors import raises

LEVEL = "level0/features"


@pytest.fixture(scope="module")
def maps():
    """(sample, channel, y, x) float32."""
    return np.random.default_rng(0).normal(size=(20, 13, 24, 24)).cumsum(3).astype("float32")


@pytest.fixture
def stored(maps, tmp_path):
    """Function that writes maps with a codec; returns the store and the bytes of its level."""

    def store(codec, dtype="float16", values=maps):
        levels, folder = (LevelSchema(*values.shape[1:], 1, "bands"),), tmp_path / f"{codec}-{dtype}"
        schema = replace(small_schema(dtype, len(values), 16, codec), levels=levels, pooled={})
        features = open_store(folder, schema, make_values=lambda _, n, __: {LEVEL: values[schema.rows(n)]})
        return features, sum(file.stat().st_size for file in (folder / "store.zarr" / LEVEL).iterdir())

    return store


def test_codecs_state_the_error_of_what_is_read_and_save_space(stored, maps):
    error, size = {}, {}
    for codec in ("none", "lz4", "zstd", "int8"):
        features, size[codec] = stored(codec)
        actual = features.read(LEVEL, np.arange(len(maps))).astype("float64")
        measured = np.sqrt(np.square(actual - maps).sum() / np.square(maps.astype("float64")).sum())
        error[codec] = features.root["level0"].attrs["relative_error"]
        assert error[codec] == pytest.approx(measured, rel=0.03)
    assert 0 < error["none"] == error["lz4"] == error["zstd"] < 2**-11 < error["int8"] < 0.02
    assert size["zstd"] <= size["lz4"] < size["none"]
    assert size["int8"] < 0.51 * size["none"]
    assert stored("zstd", "float32")[0].root["level0"].attrs["relative_error"] == 0


def test_int8_scale_is_per_map_and_channel(stored, maps):
    """Neither a large sample nor a large channel may round the others to zero."""
    uneven = maps[:20].copy()
    uneven[3] *= 1000
    uneven[:, 2] *= 100
    uneven[:, 5] = 0
    features, _ = stored("int8", "float32", uneven)
    actual = features.read(LEVEL, np.arange(20))
    assert not actual[:, 5].any()
    error = np.abs(actual - uneven).max((2, 3)) / np.maximum(np.abs(uneven).max((2, 3)), 1e-9)
    assert error.max() < 0.5 / 127 * 1.01


def test_nonfinite_values_pass_through_every_codec_but_int8(stored, maps):
    values, special = maps.copy(), [np.nan, np.inf, -np.inf, 65504]
    values[3, 1, 2, :4] = special
    for codec in ("none", "zstd"):
        features, _ = stored(codec, values=values)
        np.testing.assert_array_equal(features.read(LEVEL, [3])[0, 1, 2, :4], special)
        assert np.isfinite(features.root["level0"].attrs["relative_error"])
    for nonfinite in (np.nan, np.inf):
        values = maps.copy()
        values[7, 3, 2, 1] = nonfinite
        with raises(StoreError, LEVEL, key="extract.codec", value="int8"):
            stored("int8", values=values)


def test_int8_at_both_ends_of_the_range(stored):
    """No infinity from the largest values, and no wrong sign from the smallest."""
    values = np.random.default_rng(0).uniform(-1, 1, (20, 13, 8, 8)).astype("float32")
    is_subnormal = np.arange(20) % 5 == 0
    values[~is_subnormal] *= np.finfo("float32").max
    values[is_subnormal] *= 1e-44
    features, _ = stored("int8", "float32", values)
    actual = features.read(LEVEL, np.arange(20))
    assert np.isfinite(actual).all()
    large = np.abs(values) > 1e38
    assert np.abs(actual[large] / values[large] - 1).max() < 0.02
    assert (np.sign(actual) * np.sign(values) >= 0).all()
