"""The OSM land use source: chips, masks and their location in the scene."""

import geopandas
import numpy as np
import pytest
from pyproj import Transformer

from pipeline.data.image_store import SPLITS
from pipeline.data.sources import osm_landuse
from pipeline.errors import UserError
from pipeline.tasks import IGNORE
from tests.errors import raises


def test_prepare_counts_of_chips_classes_and_labelled_pixels(image_dataset):
    chips, tiles = image_dataset("sample-landuse"), image_dataset("sample-landuse-seg")
    assert chips.image.shape == (859, 13, 16, 16)
    assert chips.classes == ("farm", "forest", "meadow", "residential", "water")
    assert np.bincount(chips.label).tolist() == [354, 126, 271, 75, 33]
    assert tiles.image.shape == (72, 13, 128, 128)
    # 31 % of the pixels have a label; the others are ignored, not background.
    assert (tiles.label != IGNORE).mean() == pytest.approx(0.309, abs=0.002)
    for split in SPLITS:
        assert {*np.unique(tiles.label[np.array(tiles.split) == split])} == {*range(7), IGNORE}


def test_prepare_label_is_the_polygon_at_the_chips_location(image_dataset, raw_folder):
    polygons = geopandas.read_file(next(raw_folder("osm_landuse").glob("*.gpkg")))
    chips = image_dataset("sample-landuse")
    for index in range(0, 859, 90):
        x, y = Transformer.from_crs(4326, 32633, always_xy=True).transform(chips.lon[index], chips.lat[index])
        window = polygons.clip((x - 80, y - 80, x + 80, y + 80))
        areas = window.area.groupby(window.fclass.replace(osm_landuse.MERGED)).sum()
        assert areas.idxmax() == chips.classes[chips.label[index]]


def test_prepare_multilabel_lists_the_classes_of_the_masks(image_dataset):
    multilabel, tiles = image_dataset("sample-landuse-seg", task="multilabel"), image_dataset("sample-landuse-seg")
    expected = [(tiles.label == index).any(axis=(1, 2)) for index in range(7)]
    np.testing.assert_array_equal(multilabel.label, np.stack(expected, axis=1))


def test_prepare_blocks_that_do_not_divide_the_scene_lose_no_chip(image_dataset):
    """768 x 1536 px in blocks of 240: the last row and column of blocks are smaller."""
    dataset = image_dataset("sample-landuse", block=240, chip=16)
    assert len(dataset.sample) == len(image_dataset("sample-landuse").sample)
    split_of_block = {}
    for sample, split in zip(dataset.sample, dataset.split, strict=True):
        block = (int(sample[1:5]) // 240, int(sample[6:]) // 240)
        assert split_of_block.setdefault(block, split) == split


def test_prepare_chips_without_a_frequent_class_are_refused(image_dataset):
    with raises(UserError, key="chip", value=128):
        image_dataset("sample-landuse", chip=128, block=256)


def test_read_scene_missing_band_is_refused(tmp_path, raw_folder):
    for path in raw_folder("osm_landuse").glob("*_B0[1-7].jp2"):
        (tmp_path / path.name).symlink_to(path)
    with raises(UserError, "B08", key="bands", path=tmp_path) as info:
        osm_landuse.read_scene(tmp_path)
    assert info.value.value == ["B08", "B8A", "B09", "B10", "B11", "B12"]
