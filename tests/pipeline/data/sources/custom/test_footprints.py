"""What images of one's own say of themselves: where they hold data, where they lie, and what their bands are."""

import shutil

import numpy as np
import pandas as pd
import pytest
import rasterio

from pipeline.config import parse
from pipeline.data import image_store, image_writer
from pipeline.data.splits import fill_nodata
from pipeline.errors import UserError
from pipeline.mapping import open_scene
from tests.pipeline.data.sources.custom.test_custom import THREE, labelled, prepared, scene_block, tile_block, tiles
from tests.pipeline.data.sources.custom.test_labels import rewrite

__all__ = ["tiles"]
EMPTY = 65535
FIRST = "tile_0000_0000"


def copied(tiles, tmp_path):
    folder = tmp_path / "tiles"
    shutil.copytree(tiles, folder)
    return folder


def emptied(path, rows, bands=slice(None)):
    """The image without data in its first rows, of all bands or some."""

    def change(values):
        values[bands, :rows] = EMPTY
        return values

    rewrite(path, change, nodata=EMPTY)


@pytest.mark.parametrize("task", ["classification", "multilabel", "segmentation"])
def test_chips_without_data_have_no_label_and_are_left_out(tiles, tmp_path, task):
    folder = copied(tiles, tmp_path)
    described = {"task": task, "chip": 32, "options": {"purity": 0.05}}
    before = prepared(tile_block(tiles, **described), tmp_path)
    tile = next(name[:-13] for name in before.sample if name[-11:-6] == "00000")
    emptied(folder / f"images/{tile}.tif", 64)
    after = prepared(tile_block(folder, **described), tmp_path)
    top = [name for name in before.sample if name.startswith(tile) and name[-11:-6] in ("00000", "00032")]
    assert top
    assert {*before.sample} - {*after.sample} == {*top}
    assert any("are left out" in note for note in after.notes)


def test_purity_counts_what_has_no_data_as_of_no_class(tiles, tmp_path):
    folder = copied(tiles, tmp_path)
    before = prepared(tile_block(tiles, task="classification", chip=32), tmp_path)
    name = next(name for name in before.sample if name[-11:-6] == "00000")
    emptied(folder / f"images/{name[:-13]}.tif", 24)
    after = prepared(tile_block(folder, task="classification", chip=32), tmp_path)
    assert name in {*before.sample} - {*after.sample}
    assert all(one.startswith(f"{name[:-13]}_r00000") for one in {*before.sample} - {*after.sample})


def test_a_pixel_that_one_band_lacks_has_no_label(tiles, tmp_path):
    folder = copied(tiles, tmp_path)
    before = prepared(tile_block(tiles), tmp_path)
    name = next(
        name
        for name in before.sample
        if name[-11:-6] == "00000" and (before.read_sample(name).label[:8] != image_store.IGNORE).any()
    )
    emptied(folder / f"images/{name[:-13]}.tif", 8, bands=2)
    mask = prepared(tile_block(folder), tmp_path).read_sample(name).label
    assert (mask[:8] == image_store.IGNORE).all()
    np.testing.assert_array_equal(mask[8:], before.read_sample(name).label[8:])


def test_the_same_of_a_scene_in_a_file_a_band(raw_folder, tmp_path):
    folder = tmp_path / "scene"
    shutil.copytree(raw_folder("osm_landuse"), folder)
    stream = prepared(scene_block(raw_folder), tmp_path)
    name = stream.sample[0]
    row = int(name[1:6])
    before = stream.read_sample(name).label
    (path,) = folder.glob("*_B11.jp2")
    with rasterio.open(path) as file:
        values, profile = file.read(), file.profile
    values[:, : (row + 64) * len(values[0]) // 768] = EMPTY
    path.unlink()
    with rasterio.open(path.with_suffix(".tif"), "w", **profile | {"driver": "GTiff", "nodata": EMPTY}) as file:
        file.write(values)
    block = scene_block(raw_folder, options={"folder": str(folder), "images": "*_B??.[jt]*"})
    after = prepared(block, tmp_path).read_sample(name).label
    assert (before[:64] != image_store.IGNORE).any()
    assert (after[:64] == image_store.IGNORE).all()
    np.testing.assert_array_equal(after[64:], before[64:])


def test_an_image_with_a_label_and_without_data_is_refused_or_left_out(tiles, tmp_path):
    folder, options = labelled(tiles, tmp_path)
    emptied(folder / f"images/{FIRST}.tif", 128)
    stream = prepared(tile_block(tiles, task="classification", chip=0, block=128, options=options), tmp_path)
    with pytest.raises(UserError, match=f"{FIRST}.tif has no data here: every pixel is nodata"):
        stream.read_sample(f"images/{FIRST}")


@pytest.mark.parametrize("how", ["moved", "another system", "coarser and moved"])
def test_a_bands_file_that_lies_elsewhere_is_refused(raw_folder, tmp_path, how):
    folder = tmp_path / "scene"
    shutil.copytree(raw_folder("osm_landuse"), folder)
    (path,) = folder.glob("*_B04.jp2")
    with rasterio.open(path) as file:
        values, profile = file.read(), file.profile | {"driver": "GTiff"}
    a, b, c, d, e, f = tuple(profile["transform"])[:6]
    if how == "moved":
        profile |= {"transform": rasterio.Affine(a, b, c + 500, d, e, f)}
    elif how == "another system":
        profile |= {"crs": "EPSG:32632"}
    else:
        values = values[:, ::2, ::2]
        profile |= {"transform": rasterio.Affine(2 * a, b, c + 1e5, d, 2 * e, f)}
        profile |= {"height": values.shape[1], "width": values.shape[2]}
    path.unlink()
    with rasterio.open(path.with_suffix(".tif"), "w", **profile) as file:
        file.write(values)
    block = scene_block(raw_folder, options={"folder": str(folder), "images": "*_B??.[jt]*"})
    with pytest.raises(UserError, match="_B04.tif does not show the ground that .* shows"):
        prepared(block, tmp_path)


def describe(path, names):
    with rasterio.open(path, "r+") as file:
        file.descriptions = names


def test_bands_that_the_file_names_in_another_order_are_refused(tiles, tmp_path):
    folder = copied(tiles, tmp_path)
    for path in (folder / "images").iterdir():
        describe(path, ("Blue", "green", "red"))
    prepared(tile_block(folder), tmp_path)
    describe(folder / f"images/{FIRST}.tif", ("red", "green", "Blue"))
    with pytest.raises(UserError, match="its bands are red, green, blue, and they are described as blue, green, red"):
        prepared(tile_block(folder), tmp_path)


def test_an_offset_that_would_be_forgotten_is_refused(tiles, tmp_path):
    folder = copied(tiles, tmp_path)
    with rasterio.open(folder / f"images/{FIRST}.tif", "r+") as file:
        file.scales, file.offsets = (1e-4,) * 3, (-0.1,) * 3
    with pytest.raises(UserError, match="states an offset .-0.1."):
        prepared(tile_block(folder), tmp_path)


def test_an_offset_of_one_of_a_scenes_files_is_refused(raw_folder, tmp_path):
    folder = tmp_path / "scene"
    shutil.copytree(raw_folder("osm_landuse"), folder)
    (path,) = folder.glob("*_B11.jp2")
    with rasterio.open(path) as file:
        values, profile = file.read(), file.profile | {"driver": "GTiff"}
    path.unlink()
    with rasterio.open(path.with_suffix(".tif"), "w", **profile) as file:
        file.write(values)
        file.offsets = (-1000.0,)
    block = scene_block(raw_folder, options={"folder": str(folder), "images": "*_B??.[jt]*"})
    with pytest.raises(UserError, match="_B11.tif states an offset .-1000."):
        prepared(block, tmp_path)


def test_what_is_left_out_is_said(tiles, tmp_path):
    folder, options = labelled(tiles, tmp_path)
    frame = pd.read_csv(folder / "labels.csv")
    frame[:-5].to_csv(folder / "labels.csv", index=False)
    rewrite(folder / "images/tile_0000_0128.tif", crs=None)
    stream = prepared(tile_block(tiles, task="classification", chip=0, block=128, options=options), tmp_path)
    said = " ".join(stream.notes)
    assert "5 of 48 images have no row in the table" in said
    assert "no place on the map: 1 images, such as tile_0000_0128.tif" in said
    folder = copied(tiles, tmp_path)
    for kind, name in (("images", FIRST), ("masks", f"{FIRST}_mask")):
        rewrite(folder / f"{kind}/{name}.tif", lambda values: values[:, :40], height=40)
    said = prepared(tile_block(folder), tmp_path).notes
    assert any(f"1 images, such as {FIRST}, are smaller than a chip" in note for note in said)


@pytest.mark.parametrize("kind", ["declared", "not a number"])
def test_pixels_without_data_have_the_mean_of_the_others(tiles, tmp_path, kind):
    folder = copied(tiles, tmp_path)
    before = prepared(tile_block(tiles), tmp_path)
    name = next(name for name in before.sample if name[-11:-6] == "00000")
    path = folder / f"images/{name[:-13]}.tif"
    if kind == "declared":
        emptied(path, 8, bands=2)
    else:

        def change(values):
            values = values.astype("float32")
            values[2, :8] = np.nan
            return values

        rewrite(path, change)
    stream = prepared(tile_block(folder), tmp_path)
    image, known = stream.read_sample(name).image, before.read_sample(name).image[:, 8:]
    np.testing.assert_array_equal(image[:, 8:], known)
    assert (np.ptp(image[:, :8], axis=(1, 2)) == 0).all()
    np.testing.assert_allclose(image[:, 0, 0], known.mean(axis=(1, 2)), atol=0.5 if kind == "declared" else 1e-2)
    assert (stream.read_sample(name).label[:8] == image_store.IGNORE).all()
    said = "where some band has no data, all have the mean"
    assert any(said in note for note in stream.notes)
    assert not any(said in note for note in before.notes)


def test_chips_are_what_maps_read_filled(tiles, tmp_path):
    folder = copied(tiles, tmp_path)
    name = next(name for name in prepared(tile_block(tiles), tmp_path).sample if name[-11:] == "00000c00000")
    path = folder / f"images/{name[:-13]}.tif"
    emptied(path, 8)
    scene = open_scene.scene_from_rasters(
        [path], parse(open_scene.SceneConfig, {"images": "", "units": "dn", "bands": THREE})
    )
    values, valid = scene.read_window((0, 0, 64, 64), [0, 1, 2])
    chip = prepared(tile_block(folder), tmp_path).read_sample(name).image
    np.testing.assert_array_equal(chip, fill_nodata(values, valid))
    assert (values[:, :8] != chip[:, :8]).all()


@pytest.mark.parametrize("first", ["uint8", "float32"])
def test_images_of_several_types_are_stored_as_one_that_holds_all(tiles, tmp_path, first):
    folder = copied(tiles, tmp_path)
    for kind, name in ((first, "tile_0000_0000"), ({"uint8": "float32"}.get(first, "uint8"), "tile_0640_0896")):
        rewrite(folder / f"images/{name}.tif", lambda values, kind=kind: (values // 16).astype(kind))
    stream = prepared(tile_block(folder), tmp_path)
    assert stream.dtype == np.result_type("uint8", "uint16", "float32")
    image_writer.write(stream, tmp_path / "scratch", tmp_path / "store", workers=1)


def test_bands_that_are_not_brought_to_a_finer_grid_are_not_said_to_be(raw_folder, tmp_path):
    coarser = [note for note in prepared(scene_block(raw_folder), tmp_path).notes if "finest grid" in note]
    assert len(coarser) == 1
    assert "_B11.jp2" in coarser[0]
    assert "_B02.jp2" not in coarser[0]
    fine = prepared(scene_block(raw_folder, options={"images": "*_B0[2-4].jp2", "bands": THREE}), tmp_path)
    assert not any("finest grid" in note for note in fine.notes)
