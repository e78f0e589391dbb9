"""What each codec keeps and what it loses, on real maps: Sentinel-2 bands."""

import numpy as np
import pytest
import zarr
from small_store import write

from cache.codecs import parse_codec
from cache.errors import StoreError
from cache.reader import FeatureStore
from cache.schema import LevelSchema, StoreSchema


@pytest.fixture(scope="module")
def maps(image_dataset):
    """(sample, band, y, x) float32, about zero as features are."""
    image = image_dataset("sample-landuse-seg").image[:40].astype("float32")
    return (image - image.mean((0, 2, 3), keepdims=True)) / image.std((0, 2, 3), keepdims=True)


@pytest.fixture
def stored(maps, tmp_path):
    def store(codec, dtype="float16", values=maps):
        described = StoreSchema(
            sample=tuple(f"s{i}" for i in range(len(values))), split=("train",) * len(values), pooled={}, shard_size=16,
            levels=(LevelSchema(*values.shape[1:], 1, "bands"),), codec=parse_codec(codec, dtype), dtype=dtype,
        )  # fmt: skip
        folder = tmp_path / f"{codec}-{dtype}"
        write(folder, described, given=lambda layout, shard, _: {"level0/features": values[layout.rows(shard)]})
        features = FeatureStore(folder / "store.zarr")
        size = sum(file.stat().st_size for file in (folder / "store.zarr/level0/features").iterdir())
        return features, size

    return store


def test_the_store_says_what_was_lost(stored, maps):
    """Each codec's loss as the store states it, against the loss measured on what comes back."""
    said = {}
    for codec in ("none", "zstd", "bitround8", "bitround4", "int8"):
        features, _ = stored(codec)
        read = features.read("level0/features", np.arange(len(maps))).astype("float64")
        measured = np.sqrt(np.square(read - maps).sum() / np.square(maps.astype("float64")).sum())
        said[codec] = features.root["level0"].attrs["relative_error"]
        assert said[codec] == pytest.approx(measured, rel=0.03)
    assert 0 < said["none"] == said["zstd"] < said["bitround8"] < said["bitround4"]
    assert said["none"] < 2**-11
    assert said["bitround8"] < 2**-9
    assert said["bitround4"] < 2**-5
    assert said["int8"] < 0.02
    exact, _ = stored("zstd", "float32")
    assert exact.root["level0"].attrs["relative_error"] == 0


def test_what_is_given_up_saves_space(stored):
    size = {codec: stored(codec)[1] for codec in ("none", "lz4", "zstd", "bitround4", "int8")}
    assert size["bitround4"] < size["zstd"] <= size["lz4"] < size["none"]
    assert size["int8"] < 0.51 * size["none"]


def test_each_map_has_a_scale_of_its_own_for_each_channel(stored, maps):
    """One loud sample must not silence the others, nor one loud channel the rest."""
    uneven = maps[:20].copy()
    uneven[3] *= 1000
    uneven[:, 2] *= 100
    features, _ = stored("int8", "float32", uneven)
    read = features.read("level0/features", np.arange(20))
    error = np.abs(read - uneven).max((2, 3)) / np.abs(uneven).max((2, 3))
    assert error.max() < 0.5 / 127 * 1.01


def test_int8_refuses_what_it_cannot_hold(stored, maps):
    for bad in (np.nan, np.inf):
        wrong = maps[:20].copy()
        wrong[7, 3, 2, 1] = bad
        with pytest.raises(StoreError, match="NaN or infinite values, which int8 cannot hold"):
            stored("int8", "float32", wrong)


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd", "bitround4"])
def test_nan_and_infinities_pass_through_the_others(stored, maps, codec):
    odd = maps[:20].copy()
    odd[3, 1, 2, :4] = np.nan, np.inf, -np.inf, 65504
    features, _ = stored(codec, values=odd)
    np.testing.assert_array_equal(
        features.read("level0/features", [3])[0, 1, 2, :4], np.array([np.nan, np.inf, -np.inf, 65504], "float16")
    )
    assert np.isfinite(features.root["level0"].attrs["relative_error"])


def test_a_channel_of_zeros_stays_zero(stored, maps):
    empty = maps[:20].copy()
    empty[:, 5] = 0
    features, _ = stored("int8", values=empty)
    assert not features.read("level0/features", np.arange(20))[:, 5].any()


def test_int8_at_both_ends_of_the_range(stored):
    """Neither infinity from the largest numbers, nor a wrong sign from the smallest."""
    ends = np.random.default_rng(0).uniform(-1, 1, (20, 13, 8, 8)).astype("float32")
    faint = np.arange(20) % 5 == 0
    ends[~faint] *= np.finfo("float32").max
    ends[faint] *= 1e-44
    features, _ = stored("int8", "float32", ends)
    read = features.read("level0/features", np.arange(20))
    assert np.isfinite(read).all()
    large = np.abs(ends) > 1e38
    assert np.abs(read[large] / ends[large] - 1).max() < 0.02
    assert (np.sign(read) * np.sign(ends) >= 0).all()


def test_zarr_says_how_it_is_compressed(stored):
    features, _ = stored("lz4")
    assert zarr.open_group(features.location)["level0/features"].compressors[0].cname.value == "lz4"


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        ("gzip", "float16", "there is no codec 'gzip'; there are none, lz4, zstd, bitround<bits kept> and int8"),
        ("bitround", "float16", "there is no codec 'bitround'"),
        ("bitround11", "float16", "float16 has 10: bitround1 to 10"),
        ("bitround0", "float32", "float32 has 23"),
    ],
)
def test_codecs_that_are_none(name, dtype, said):
    with pytest.raises(ValueError, match=said):
        parse_codec(name, dtype)
