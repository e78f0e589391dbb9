"""Raster images: their files, bands and grids."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio import Affine

from pipeline.data.sources.custom.rasters import has_token, open_image
from pipeline.errors import UserError
from pipeline.tasks import IGNORE
from tests.errors import raises
from tests.pipeline.data.sources.custom.custom_data import (
    GRID,
    NODATA,
    UTM,
    counting_values,
    make_options,
    prepare,
    scene_dataset,
    scene_options,
    write_raster,
)


@pytest.fixture
def changed_scene(raw_folder, tmp_path):
    """Function that writes a band of the scene as a changed GeoTIFF; returns its path and a dataset."""

    def make(band: str, change=lambda values, profile: (values, profile)):
        folder = tmp_path / "scene"
        shutil.copytree(raw_folder("osm_landuse"), folder)
        (path,) = folder.glob(f"*_{band}.jp2")
        with rasterio.open(path) as file:
            values, profile = change(file.read(), file.profile | {"driver": "GTiff"})
        path.unlink()
        with rasterio.open(path.with_suffix(".tif"), "w", **profile) as file:
            file.write(values)
        dataset = scene_dataset(raw_folder, options={"folder": str(folder), "images": "*_B??.[jt]*"})
        return path.with_suffix(".tif"), dataset

    return make


# Names of bands and files


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [("LC08_B1", "B1", True), ("LC08_B10", "B1", False), ("tile_1_mask", "tile_1", True),
     ("tile_10_mask", "tile_1", False)],
)  # fmt: skip
def test_has_token_is_a_whole_word(text, name, expected):
    assert has_token(text, name) == expected


def test_open_scene_files_band_names_are_whole_and_files_unique(raw_folder, tmp_path):
    for name in ("B02", "B03", "B8A"):
        write_raster(tmp_path / f"s_{name}.tif", counting_values(128, 128), GRID)
    for bands, key, count in ((["B02", "B03", "B8"], "B8", 0), (["B02", "s_B02"], "s_B02", 1)):
        with raises(UserError, key=key, value=count):
            prepare(scene_dataset(raw_folder, options=scene_options(tmp_path, bands)), tmp_path)
    write_raster(tmp_path / "s_B04.tif", np.repeat(counting_values(128, 128), 3, 0), GRID)
    with raises(UserError, key="bands", value=3, allowed=[1], path=tmp_path / "s_B04.tif"):
        prepare(scene_dataset(raw_folder, options=scene_options(tmp_path, ["B02", "B03", "B04"])), tmp_path)


def test_open_scene_files_names_at_the_end_of_a_word_and_alpha_bands(raw_folder, tmp_path):
    for name in ("sceneB02", "sceneB8A"):
        write_raster(tmp_path / f"{name}.tif", counting_values(128, 128), GRID)
    with_alpha = np.stack([counting_values(128, 128)[0], np.full((128, 128), 65535, "uint16")])
    write_raster(tmp_path / "sceneB03.tif", with_alpha, GRID, photometric="MINISBLACK", alpha="YES")
    options = scene_options(tmp_path, ["B02", "B03", "B8A"])
    dataset = prepare(scene_dataset(raw_folder, chip=32, block=32, options=options), tmp_path)
    np.testing.assert_array_equal(dataset.read_sample("r00000c00000").image[1], with_alpha[0, :32, :32])
    with raises(UserError, key="B8", value=0):
        prepare(scene_dataset(raw_folder, options=scene_options(tmp_path, ["B02", "B8"])), tmp_path)


def test_open_image_bands_in_another_order_or_with_an_offset_are_refused(tiles, tmp_path):
    path = Path(shutil.copy(tiles / "images/tile_0000_0000.tif", tmp_path))
    bands = make_options(tiles).bands

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


def test_open_scene_files_damaged_file_is_named(raw_folder, tmp_path):
    folder = tmp_path / "scene"
    shutil.copytree(raw_folder("osm_landuse"), folder)
    (path,) = folder.glob("*_B11.jp2")
    for content in (path.read_bytes()[:3000], b""):
        path.write_bytes(content)
        with raises(UserError, path=path):
            prepare(scene_dataset(raw_folder, options={"folder": str(folder)}), tmp_path)


def test_read_sample_nodata_of_one_band_has_no_label(prepared_scene, changed_scene, tmp_path):
    before = prepared_scene
    name = before.sample[0]
    row = int(name[1:6])

    def set_rows_to_nodata(values, profile):
        values[:, : (row + 64) * len(values[0]) // 768] = NODATA
        return values, profile | {"nodata": NODATA}

    _, dataset = changed_scene("B11", set_rows_to_nodata)
    mask, expected = prepare(dataset, tmp_path).read_sample(name).label, before.read_sample(name).label
    assert (expected[:64] != IGNORE).any()
    assert (mask[:64] == IGNORE).all()
    np.testing.assert_array_equal(mask[64:], expected[64:])


# Grids


def move(values, profile):
    a, b, c, d, e, f = tuple(profile["transform"])[:6]
    return values, profile | {"transform": Affine(a, b, c + 500, d, e, f)}


def change_crs(values, profile):
    return values, profile | {"crs": "EPSG:32632"}


def coarsen_and_move(values, profile):
    a, b, c, d, e, f = tuple(profile["transform"])[:6]
    values = values[:, ::2, ::2]
    profile |= {"transform": Affine(2 * a, b, c + 1e5, d, 2 * e, f)}
    return values, profile | {"height": values.shape[1], "width": values.shape[2]}


@pytest.mark.parametrize("change", [move, change_crs, coarsen_and_move])
def test_open_scene_files_band_of_another_area_is_refused(changed_scene, tmp_path, change):
    path, dataset = changed_scene("B04", change)
    with raises(UserError, key="images", path=path):
        prepare(dataset, tmp_path)


def test_open_scene_files_band_without_crs_of_another_area_is_refused(raw_folder, tmp_path):
    write_raster(tmp_path / "s_B02.tif", counting_values(128, 128), GRID)
    write_raster(tmp_path / "s_B03.tif", counting_values(128, 128), Affine(10, 0, 0, 0, -10, 0), crs=None)
    with raises(UserError, tmp_path / "s_B02.tif", key="images", path=tmp_path / "s_B03.tif"):
        prepare(scene_dataset(raw_folder, options=scene_options(tmp_path, ["B02", "B03"])), tmp_path)


def test_read_sample_band_that_ends_inside_the_scene_has_no_data_there(raw_folder, tmp_path):
    for name, offset in (("B02", 0), ("B03", 1000)):
        write_raster(tmp_path / f"s_{name}.tif", counting_values(384, 384, offset), GRID)
    write_raster(tmp_path / "s_B01.tif", counting_values(64, 63, 5000), GRID * Affine.scale(6))
    options = scene_options(tmp_path, ["B02", "B03", "B01"])
    dataset = prepare(scene_dataset(raw_folder, chip=64, block=64, options=options), tmp_path)
    sample = dataset.read_sample("r00000c00320")
    assert (sample.label[:, 58:] == IGNORE).all()
    assert (sample.label[:, :58] != IGNORE).all()
    assert sample.image[2].min() >= 5000
    assert any("mean" in note for note in dataset.notes)


def test_open_scene_files_finest_grid_is_found_in_metres(raw_folder, tmp_path):
    for name in ("B02", "B03"):
        write_raster(tmp_path / f"s_{name}.tif", counting_values(256, 256), GRID)
    west, north = rasterio.warp.transform(UTM, "EPSG:4326", [399000], [5801000])
    in_degrees = Affine(0.000278, 0, west[0], 0, -0.000278, north[0])
    write_raster(tmp_path / "s_DEM.tif", np.ones((1, 300, 300), "uint16"), in_degrees, "EPSG:4326")
    options = scene_options(tmp_path, ["B02", "B03", "DEM"])
    dataset = prepare(scene_dataset(raw_folder, chip=64, block=64, options=options), tmp_path)
    assert len(dataset.sample) == 16
    expected = counting_values(256, 256)[0, 64:128, :64]
    np.testing.assert_array_equal(dataset.read_sample("r00064c00000").image[0], expected)
    assert [note.split()[0] for note in dataset.notes if "finest grid" in note] == ["s_DEM.tif"]


def test_resampled_bands_are_noted_and_no_others(prepared_scene):
    (note,) = [note for note in prepared_scene.notes if "finest grid" in note]
    assert "_B11.jp2" in note
    assert "_B02.jp2" not in note
