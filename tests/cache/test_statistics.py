"""Statistics and principal components, against NumPy in float64 and scikit-learn on the whole array."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.decomposition import PCA
from small_store import open_store, shard_values, small_schema

from cache import running_stats, statistics
from cache.errors import StoreError
from cache.running_stats import RunningStats
from cache.statistics import principal_components, project
from tests.errors import raises


def training_maps(features, level):
    """All training maps in all views as they are read, float64 (map, channel, y, x)."""
    rows = features.rows("train")
    maps = [features.read(f"{level}/features", rows, view) for view in features.view or [None]]
    return np.concatenate(maps).astype("float64")


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("views", [(), ("identity", "flip_x")], ids=["plain", "views"])
def test_training_statistics_are_those_of_what_is_read(tmp_path, codec, views):
    schema = small_schema(codec=codec, views=views, shard_size=16)
    # Shards without a training sample, and with one.
    split = ("test",) * 32 + ("train",) + ("val",) * 40 + schema.split[73:]
    features = open_store(tmp_path, replace(schema, split=split))
    for level in ("level0", "level1"):
        maps = training_maps(features, level)
        mean, std = features.statistics(level)
        assert mean.dtype == std.dtype == np.float64
        np.testing.assert_allclose(mean, maps.mean(axis=(0, 2, 3)), rtol=0, atol=1e-13)
        np.testing.assert_allclose(std, maps.std(axis=(0, 2, 3)), rtol=1e-13)


def test_training_statistics_keep_a_small_spread_around_a_large_mean_and_show_a_single_nan(tmp_path):
    """The mean of squares minus the square of the mean would give zero or less."""

    def make_values(schema, shard, seed):
        values = {name: 1e4 + np.float32(0.01) * array for name, array in shard_values(schema, shard, seed).items()}
        values["level0/features"][1, 2, 0, 0] = np.nan
        return values

    features = open_store(tmp_path, small_schema(dtype="float32"), make_values=make_values)
    mean, std = features.statistics("level0")
    np.testing.assert_allclose(std, training_maps(features, "level0").std(axis=(0, 2, 3)), rtol=1e-9)
    assert np.isnan(mean).tolist() == np.isnan(std).tolist() == [False, False, True, False, False]


def test_training_statistics_without_training_samples_are_nan(tmp_path):
    features = open_store(tmp_path, replace(small_schema(), split=("test",) * 150))
    assert np.isnan(features.statistics("level0")).all()


@pytest.mark.parametrize("values_per_read", [10, 1 << 22], ids=["a sample per block", "one block"])
def test_principal_components_equal_scikit_learn(tmp_path, monkeypatch, values_per_read):
    monkeypatch.setattr(statistics, "_VALUES_PER_READ", values_per_read)
    features = open_store(tmp_path)
    with raises(StoreError, 5, 6400, key="n_components", value=6):
        principal_components(features, "level0", 6)
    pca = principal_components(features, "level0", 3)
    cells = training_maps(features, "level0").transpose(0, 2, 3, 1).reshape(-1, 5)
    exact = PCA(3).fit(cells)
    np.testing.assert_allclose(pca.explained_variance_ratio_, exact.explained_variance_ratio_, rtol=0.05)
    maps = features.read("level0/features", [3, 77])
    reduced = project(pca, maps)
    assert reduced.shape == (2, 3, 8, 8)
    assert reduced.dtype == np.float32
    np.testing.assert_allclose(reduced[1, :, 4, 6], pca.transform(maps[1:, :, 4, 6].astype("float64"))[0], rtol=1e-5)


def random_maps(dtype):
    return np.random.default_rng(0).normal(3, 2, (40, 6, 9, 11)).astype(dtype)


def merge_split(maps, bounds):
    return RunningStats.merge(RunningStats.from_array(part) for part in np.split(maps, bounds))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("bounds", [[], [1], [7, 8, 30]])
@pytest.mark.parametrize("block_values", [1, 2000])
def test_merge_of_any_blocks_gives_the_stats_of_the_whole(monkeypatch, dtype, bounds, block_values):
    monkeypatch.setattr(running_stats.block_slices, "__defaults__", (block_values,))
    maps = random_maps(dtype)
    actual, exact = merge_split(maps, bounds), maps.astype("float64")
    assert actual.count == maps[:, 0].size
    np.testing.assert_allclose(actual.mean, exact.mean(axis=(0, 2, 3)), rtol=0, atol=1e-14)
    np.testing.assert_allclose(actual.std(), exact.std(axis=(0, 2, 3)), rtol=1e-14)


def test_std_shows_one_value_that_differs_in_its_last_bit():
    maps = np.full((50, 2, 20, 20), 2048, "float16")  # the second channel is constant
    maps[17, 0, 3, 4] = 2050
    fraction = 1 / maps[:, 0].size
    expected = [2 * np.sqrt(fraction * (1 - fraction)), 0]
    np.testing.assert_allclose(merge_split(maps, [10, 30]).std(), expected, rtol=1e-12)


@pytest.mark.parametrize("nonfinite", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("index", [(0, 1, 0, 0), (20, 1, 5, 5)])
def test_nonfinite_values_show_in_their_channel_only(nonfinite, index):
    maps = random_maps("float32")
    maps[index] = nonfinite
    stats = merge_split(maps, [10])
    np.testing.assert_array_equal(np.isfinite(stats.mean), np.arange(6) != 1)
    np.testing.assert_array_equal(np.isfinite(stats.std()), np.arange(6) != 1)
