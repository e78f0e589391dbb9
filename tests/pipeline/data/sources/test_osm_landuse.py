import numpy as np
import pytest
import rasterio
from pyproj import Transformer

from pipeline.data.image_store import IGNORE
from pipeline.data.sources import osm_landuse
from pipeline.errors import UserError


def test_counts(image_dataset):
    chips, tiles = image_dataset("sample-landuse"), image_dataset("sample-landuse-seg")
    assert chips.image.shape == (859, 13, 16, 16)
    assert chips.classes == ("farm", "forest", "meadow", "residential", "water")
    assert np.bincount(chips.label).tolist() == [354, 126, 271, 75, 33]
    assert tiles.image.shape == (72, 13, 128, 128)
    # 31 % of the pixels carry a label; the rest is ignored, not background.
    assert (tiles.label != IGNORE).mean() == pytest.approx(0.309, abs=0.002)


def test_every_class_of_the_masks_is_in_every_split(image_dataset):
    tiles = image_dataset("sample-landuse-seg")
    for split in ("train", "val", "test"):
        found = np.unique(tiles.label[np.array(tiles.split) == split])
        assert set(found) == {*range(7), IGNORE}


def test_pixels_are_those_of_the_band_files(image_dataset, raw_folder):
    chips = image_dataset("sample-landuse")
    row, column = int(chips.sample[100][1:5]), int(chips.sample[100][6:])
    for position, band in enumerate(osm_landuse.BANDS):
        with rasterio.open(next(raw_folder("osm_landuse").glob(f"*_{band.name}.jp2"))) as file:
            step = int(band.gsd // 10)
            assert chips.image[100, position, 5, 7] == file.read(1)[(row + 5) // step, (column + 7) // step]


def test_a_label_is_the_polygon_at_that_place(image_dataset, raw_folder):
    import geopandas

    polygons = geopandas.read_file(next(raw_folder("osm_landuse").glob("*.gpkg")))
    chips = image_dataset("sample-landuse")
    for index in range(0, 859, 90):
        x, y = Transformer.from_crs(4326, 32633, always_xy=True).transform(chips.lon[index], chips.lat[index])
        window = polygons.clip((x - 80, y - 80, x + 80, y + 80))
        areas = window.area.groupby(window.fclass.replace(osm_landuse.MERGED)).sum()
        assert areas.idxmax() == chips.classes[chips.label[index]]


def test_multilabel_from_the_same_masks(image_dataset):
    many, tiles = image_dataset("sample-landuse-seg", task="multilabel"), image_dataset("sample-landuse-seg")
    assert many.label.shape == (72, 7)
    for hot, mask in zip(many.label, tiles.label, strict=True):
        assert np.flatnonzero(hot).tolist() == [value for value in np.unique(mask) if value != IGNORE]


def test_blocks_that_do_not_divide_the_scene(image_dataset):
    """768 x 1536 px in blocks of 240: the last row and column of blocks are smaller, and none is lost."""
    made = image_dataset("sample-landuse", block=240, chip=16)
    assert len(made.sample) == len(image_dataset("sample-landuse").sample)
    owner = {}
    for sample, split in zip(made.sample, made.split, strict=True):
        assert owner.setdefault((int(sample[1:5]) // 240, int(sample[6:]) // 240), split) == split
    assert max(row for row, _ in owner) == 3


def test_chips_too_large_for_the_polygons(image_dataset):
    with pytest.raises(UserError, match="at least 30 chips of 64 px"):
        image_dataset("sample-landuse", chip=64)


def test_a_missing_band_file_names_those_that_are_there(raw_folder, params, tmp_path):
    for path in raw_folder("osm_landuse").iterdir():
        if not path.name.endswith("B11.jp2"):
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(UserError, match="lacks the files of bands B11; it has B01, B02"):
        osm_landuse.prepare(tmp_path, params.dataset("sample-landuse"))
