"""Moments summed in pieces, against numpy in float64 on everything at once."""

import json

import numpy as np
import pytest

from cache import running_stats


def drawn(dtype, count=40, shape=(6, 9, 11)):
    generator = np.random.default_rng(0)
    return generator.normal(3, 2, (count, *shape)).astype(dtype)


def whole(maps, cuts):
    return running_stats.RunningStats.merge(running_stats.RunningStats.from_array(part) for part in np.split(maps, cuts))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("cuts", [[], [1], [7, 8, 30]])
@pytest.mark.parametrize("piece", [1, 2000, 2**16])
def test_any_pieces_give_the_moments_of_all(monkeypatch, dtype, cuts, piece):
    monkeypatch.setattr(running_stats, "_BLOCK_VALUES", piece)
    maps = drawn(dtype)
    found, exact = whole(maps, cuts), maps.astype("float64")
    assert found.count == maps[:, 0].size
    np.testing.assert_allclose(found.mean, exact.mean(axis=(0, 2, 3)), rtol=0, atol=1e-14)
    np.testing.assert_allclose(found.std(), exact.std(axis=(0, 2, 3)), rtol=1e-14)


def test_a_channel_that_never_changes_has_no_spread():
    maps = drawn("float16")
    maps[:, 2] = 1234.5
    assert whole(maps, [3, 20]).std()[2] == 0


def test_one_value_that_differs_in_its_last_bit_shows():
    maps = np.full((50, 2, 20, 20), 2048, "float16")
    maps[17, 0, 3, 4] = 2050
    share = 1 / maps[:, 0].size
    np.testing.assert_allclose(whole(maps, [10, 30]).std(), [2 * np.sqrt(share * (1 - share)), 0], rtol=1e-12)


def test_a_record_gives_the_same_bits_back():
    found = whole(drawn("float16"), [5])
    again = running_stats.RunningStats.from_json(json.loads(json.dumps(found.to_json())))
    assert again.count == found.count
    assert again.mean.tobytes() == found.mean.tobytes()
    assert again.squared_deviations.tobytes() == found.squared_deviations.tobytes()


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 1, 0, 0), (20, 1, 5, 5)])
def test_values_that_are_no_finite_numbers_show_in_their_channel_alone(odd, place):
    maps = drawn("float32")
    maps[place] = odd
    found = whole(maps, [10])
    np.testing.assert_array_equal(np.isfinite(found.mean), np.arange(6) != 1)
    np.testing.assert_array_equal(np.isfinite(found.std()), np.arange(6) != 1)


def test_of_nothing_there_are_none():
    assert running_stats.RunningStats.from_array(drawn("float16")[:0]) is None
    assert running_stats.RunningStats.merge([]) is None
