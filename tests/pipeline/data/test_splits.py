"""Chips, assignment of blocks to splits, and overlap of chips."""

import numpy as np
import pytest
from pyproj import CRS
from rasterio import Affine

from pipeline.config import SplitFractions
from pipeline.data import splits
from pipeline.errors import UserError
from tests.errors import raises

FRACTIONS = SplitFractions(0.6, 0.2, 0.2)
UTM, WGS84 = (CRS.from_epsg(code).to_wkt() for code in (32633, 4326))


def test_chip_corners_tile_the_image_without_overlap():
    image = np.arange(50 * 70).reshape(50, 70)
    chips = np.stack([splits.crop(image, corner, 16) for corner in splits.chip_corners(50, 70, 16)])
    assert chips.shape == (3 * 4, 16, 16)
    assert len(np.unique(chips)) == chips.size


def test_assign_blocks_to_splits_meets_the_fractions_of_blocks_and_classes():
    areas = np.random.default_rng(0).poisson(30, size=(20, 4)).astype(float)
    split_of_block = splits.assign_blocks_to_splits(areas, FRACTIONS, seed=0)
    assert np.bincount(split_of_block).tolist() == [12, 4, 4]
    shares = areas[split_of_block == 0].sum(axis=0) / areas.sum(axis=0)
    assert np.abs(shares - 0.6).max() < 0.06
    assert (splits.assign_blocks_to_splits(areas, FRACTIONS, seed=0) == split_of_block).all()
    with raises(UserError, key="block", value=2):
        splits.assign_blocks_to_splits(np.ones((2, 2)), FRACTIONS, seed=0)


def test_fill_nodata_uses_the_mean_of_the_valid_pixels():
    chip, is_valid = np.array([[[1, 2], [4, 9]], [[5, 5], [6, 0]]], np.uint16), np.array([[1, 1], [1, 0]], bool)
    filled = splits.fill_nodata(chip, is_valid)
    assert filled.dtype == np.uint16
    assert filled.tolist() == [[[1, 2], [4, 2]], [[5, 5], [6, 5]]]
    with_nan = np.where(is_valid, chip, np.nan).astype("float32")
    np.testing.assert_allclose(splits.fill_nodata(with_nan, is_valid)[:, 1, 1], [7 / 3, 16 / 3], rtol=1e-6)
    assert splits.fill_nodata(chip, np.ones((2, 2), bool)) is chip


def footprint(image: str, x: float, crs: str = UTM, size: int = 64, y: float = 5_800_000.0, step: float = 10.0):
    return splits.Footprint((image,), crs, Affine(step, 0, x, 0, -step, y), 0, 0, size, size)


@pytest.mark.parametrize(
    ("b", "overlaps"),
    [
        (footprint("b", 400_320), True),
        (footprint("b", 400_640), False),  # a common edge
        (footprint("b", 400_637), False),  # less than 1 % of the chip
        (footprint("b", 400_320, ""), False),  # no CRS
        (footprint("a", 400_320), False),  # the same image
        (splits.Footprint(("b",), "", None, 0, 0, 64, 64), False),
    ],
)
def test_overlapping_pairs_are_chips_of_two_images_on_the_same_ground(b, overlaps):
    pairs = splits.overlapping_pairs([footprint("a", 400_000), b])
    assert pairs.tolist() == ([[0, 1]] if overlaps else [])
