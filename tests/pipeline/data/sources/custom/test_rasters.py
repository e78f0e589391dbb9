"""Raster images: their files, bands and grids."""

import shutil
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from rasterio import Affine

from pipeline.data.sources.custom.rasters import open_image
from pipeline.errors import UserError
from pipeline.tasks import IGNORE
from tests.errors import raises
from tests.pipeline.data.sources.custom import custom_data
from tests.pipeline.data.sources.custom.custom_data import GRID, NODATA, UTM, counting_values, write_raster


@pytest.fixture
def prepare_scene(raw_folder, tmp_path):
    """Function from the bands of files in `tmp_path`, one per band, to their scene with two polygons."""

    def prepare_files(bands, chip=128):
        with rasterio.open(next(tmp_path.glob("*B02.tif"))) as file:
            west, south, east, north = file.bounds
        middle = (west + east) / 2
        halves = [shapely.box(west, south, middle, north), shapely.box(middle, south, east, north)]
        polygons = geopandas.GeoDataFrame({"fclass": ["a", "b"]}, geometry=halves, crs=UTM)
        polygons.to_file(tmp_path / "land.geojson")
        options = {
            "folder": str(tmp_path), "images": "*.tif", "labels": "land.geojson", "time": "",
            "bands": [{"name": name, "common_name": name.lower()} for name in bands],
        }  # fmt: skip
        dataset = custom_data.scene_dataset(raw_folder, chip=chip, block=chip, options=options)
        return custom_data.prepare(dataset, tmp_path)

    return prepare_files


def test_open_scene_files_band_names_are_whole_and_files_unique(prepare_scene, tmp_path):
    for name in ("B02", "B03", "B8A"):
        write_raster(tmp_path / f"s_{name}.tif", counting_values(128, 128), GRID)
    for bands, key, count in ((["B02", "B03", "B8"], "B8", 0), (["B02", "s_B02"], "s_B02", 1)):
        with raises(UserError, key=key, value=count):
            prepare_scene(bands)
    write_raster(tmp_path / "s_B04.tif", np.repeat(counting_values(128, 128), 3, 0), GRID)
    with raises(UserError, key="bands", value=3, allowed=[1], path=tmp_path / "s_B04.tif"):
        prepare_scene(["B02", "B03", "B04"])


def test_open_scene_files_names_at_the_end_of_a_word_and_alpha_bands(prepare_scene, tmp_path):
    for name in ("sceneB02", "sceneB8A"):
        write_raster(tmp_path / f"{name}.tif", counting_values(128, 128), GRID)
    with_alpha = np.stack([counting_values(128, 128)[0], np.full((128, 128), 65535, "uint16")])
    write_raster(tmp_path / "sceneB03.tif", with_alpha, GRID, photometric="MINISBLACK", alpha="YES")
    dataset = prepare_scene(["B02", "B03", "B8A"], chip=32)
    np.testing.assert_array_equal(dataset.read_sample("r00000c00000").image[1], with_alpha[0, :32, :32])
    with raises(UserError, key="B8", value=0):
        prepare_scene(["B02", "B8"])


def test_open_image_bands_in_another_order_or_with_an_offset_are_refused(tiles, tmp_path):
    path = Path(shutil.copy(tiles / "images/tile_0000_0000.tif", tmp_path))
    bands = custom_data.make_options(tiles).bands

    def change(**attributes):
        with rasterio.open(path, "r+") as file:
            for name, value in attributes.items():
                setattr(file, name, value)

    change(descriptions=("Blue", "green", "red"))
    assert open_image([path], bands).n_bands == 3
    change(descriptions=("red", "green", "Blue"))
    with raises(UserError, key="bands", value=("red", "green", "blue"), allowed=("blue", "green", "red"), path=path):
        open_image([path], bands)
    change(descriptions=("blue", "green", "red"), scales=(1e-4,) * 3, offsets=(-0.1,) * 3)
    with raises(UserError, key="offsets", value=-0.1, path=path):
        open_image([path], bands)


@pytest.mark.parametrize(
    ("transform", "crs"),
    [(GRID @ Affine.translation(50, 0), UTM), (GRID, "EPSG:32632"),
     (GRID @ Affine.translation(10000, 0) @ Affine.scale(2), UTM), (Affine(10, 0, 0, 0, -10, 0), None)],
    ids=["moved", "another CRS", "coarse and moved", "without CRS"],
)  # fmt: skip
def test_open_scene_files_band_of_another_area_is_refused(prepare_scene, tmp_path, transform, crs):
    write_raster(tmp_path / "s_B02.tif", counting_values(128, 128), GRID)
    write_raster(tmp_path / "s_B03.tif", counting_values(128, 128), transform, crs)
    with raises(UserError, tmp_path / "s_B02.tif", key="images", path=tmp_path / "s_B03.tif"):
        prepare_scene(["B02", "B03"])


def test_read_sample_band_without_data_in_a_part_of_the_scene_has_no_label_there(prepare_scene, tmp_path):
    for name, offset in (("B02", 0), ("B03", 1000)):
        write_raster(tmp_path / f"s_{name}.tif", counting_values(384, 384, offset), GRID)
    ends_inside, has_nodata = counting_values(64, 63, 5000), counting_values(192, 192)
    has_nodata[:, :4] = NODATA
    write_raster(tmp_path / "s_B01.tif", ends_inside, GRID @ Affine.scale(6))
    write_raster(tmp_path / "s_B11.tif", has_nodata, GRID @ Affine.scale(2), nodata=NODATA)
    dataset = prepare_scene(["B02", "B03", "B01", "B11"], chip=64)
    sample = dataset.read_sample("r00000c00320")
    assert (sample.label[:, 58:] == IGNORE).all()
    assert (sample.label[:8] == IGNORE).all()
    assert (sample.label[8:, :58] != IGNORE).all()
    assert sample.image[2].min() >= 5000
    assert sample.image[3].max() < NODATA
    assert any("mean" in note for note in dataset.notes)


def test_open_scene_files_finest_grid_is_found_in_metres(prepare_scene, tmp_path):
    for name in ("B02", "B03"):
        write_raster(tmp_path / f"s_{name}.tif", counting_values(256, 256), GRID)
    west, north = rasterio.warp.transform(UTM, "EPSG:4326", [399000], [5801000])
    in_degrees = Affine(0.000278, 0, west[0], 0, -0.000278, north[0])
    write_raster(tmp_path / "s_DEM.tif", np.ones((1, 300, 300), "uint16"), in_degrees, "EPSG:4326")
    dataset = prepare_scene(["B02", "B03", "DEM"], chip=64)
    assert len(dataset.sample) == 16
    expected = counting_values(256, 256)[0, 64:128, :64]
    np.testing.assert_array_equal(dataset.read_sample("r00064c00000").image[0], expected)
    assert [note.split()[0] for note in dataset.notes if "finest grid" in note] == ["s_DEM.tif"]
