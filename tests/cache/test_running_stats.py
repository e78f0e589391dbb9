"""Statistics merged from blocks, against NumPy in float64 on the whole array."""

import numpy as np
import pytest

from cache import running_stats
from cache.running_stats import RunningStats, mean_std_from_sums


def random_maps(dtype, count=40, shape=(6, 9, 11)):
    generator = np.random.default_rng(0)
    return generator.normal(3, 2, (count, *shape)).astype(dtype)


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


def test_mean_std_from_sums_equals_numpy():
    pixels = random_maps("float32").astype("float64")
    sums = pixels.sum(axis=(0, 2, 3)), np.square(pixels).sum(axis=(0, 2, 3))
    mean, std = mean_std_from_sums(pixels[:, 0].size, *sums)
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), rtol=1e-12)
