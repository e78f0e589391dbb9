import numpy as np
import pytest

from pipeline.config import SplitFractions
from pipeline.data import splits
from pipeline.errors import UserError

SPLITS = SplitFractions(0.6, 0.2, 0.2)


def test_chips_tile_without_overlap_and_stay_inside():
    places = splits.chip_corners(50, 70, 16)
    assert len(places) == 3 * 4
    image = np.arange(50 * 70).reshape(50, 70)
    cut = np.stack([splits.crop(image, place, 16) for place in places])
    assert cut.shape == (12, 16, 16)
    assert len(np.unique(cut)) == cut.size


def test_blocks_are_dealt_in_the_wanted_numbers_and_shares():
    counts = np.random.default_rng(0).poisson(30, size=(20, 4)).astype(float)
    deal = splits.assign_blocks_to_splits(counts, SPLITS, seed=0)
    assert np.bincount(deal).tolist() == [12, 4, 4]
    shares = counts[deal == 0].sum(axis=0) / counts.sum(axis=0)
    assert np.abs(shares - 0.6).max() < 0.06
    assert (splits.assign_blocks_to_splits(counts, SPLITS, seed=0) == deal).all()


def test_too_few_blocks():
    with pytest.raises(UserError, match="cannot fill three splits"):
        splits.assign_blocks_to_splits(np.ones((2, 2)), SPLITS, seed=0)


def test_pixels_that_are_not_known_are_filled_with_the_mean_of_the_others():
    chip, known = np.array([[[1, 2], [4, 9]], [[5, 5], [6, 0]]], np.uint16), np.array([[True, True], [True, False]])
    found = splits.fill_nodata(chip, known)
    assert found.dtype == np.uint16
    assert found.tolist() == [[[1, 2], [4, 2]], [[5, 5], [6, 5]]]
    broken = np.where(known, chip, np.nan).astype("float32")
    np.testing.assert_allclose(splits.fill_nodata(broken, known)[:, 1, 1], [7 / 3, 16 / 3], rtol=1e-6)
    assert splits.fill_nodata(chip, np.ones((2, 2), bool)) is chip
