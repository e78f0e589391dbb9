"""Custom data end to end: a scene with polygons, images with masks, images with a table."""

import re
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import rasterio
import yaml

from pipeline.config import DatasetConfig, parse
from pipeline.data import image_store, image_writer
from pipeline.data.sources import custom, validate
from pipeline.data.splits import fill_nodata
from pipeline.errors import UserError
from pipeline.mapping import scene as open_scene
from pipeline.tasks import IGNORE
from tests.conftest import ROOT
from tests.errors import raises
from tests.pipeline.data.sources.custom.custom_data import (
    BANDS,
    BLUE_GREEN_RED,
    copy_tiles,
    prepare,
    rewrite_raster,
    scene_dataset,
    set_nodata,
    table_dataset,
    tile_dataset,
    with_options,
    write_table,
)


def first_row_chip(dataset, has: Callable = lambda name: True) -> str:
    """Name of the first chip at the upper edge of its image that fulfils a condition."""
    return next(name for name in dataset.sample if name[-11:-6] == "00000" and has(name))


def test_prepare_scene_with_polygons_equals_the_osm_landuse_source(raw_folder, image_dataset, tmp_path):
    dataset, expected = prepare(scene_dataset(raw_folder), tmp_path), image_dataset("sample-landuse-seg")
    assert len(dataset.sample) == len(expected.sample) == 72
    indices = {name: index for index, name in enumerate(expected.classes)}
    indices["grass"] = indices["meadow"]
    renumber = np.full(256, IGNORE)
    renumber[: len(dataset.classes)] = [indices[name] for name in dataset.classes]
    for index in (0, 30, 71):
        sample = dataset.read_sample(dataset.sample[index])
        np.testing.assert_array_equal(sample.image, expected.image[index])
        np.testing.assert_array_equal(renumber[sample.label], expected.label[index])
        assert (sample.lat, sample.lon) == pytest.approx((expected.lat[index], expected.lon[index]))
        assert sample.time == expected.time[index]


def test_prepare_images_with_masks_reads_chips_of_both(tiles, tmp_path):
    dataset = prepare(tile_dataset(tiles), tmp_path)
    assert dataset.shape == (3, 64, 64)
    name = next(name for name in dataset.sample if name.startswith("tile_0128_0256") and name.endswith("c00064"))
    sample, row = dataset.read_sample(name), int(name[-11:-6])
    with rasterio.open(tiles / "images/tile_0128_0256.tif") as file:
        np.testing.assert_array_equal(sample.image, file.read()[:, row:, 64:][:, :64])
    with rasterio.open(tiles / "masks/tile_0128_0256_mask.tif") as file:
        np.testing.assert_array_equal(sample.label, file.read(1)[row:, 64:][:64])
    classified = prepare(tile_dataset(tiles, task="classification", chip=32), tmp_path)
    assert all((classified.read_sample(name).label < 7).all() for name in classified.sample[:9])
    assert "60%" in classified.notes[0]
    multilabel = prepare(tile_dataset(tiles, task="multilabel"), tmp_path)
    assert multilabel.read_sample(name).label.tolist() == [int((sample.label == index).any()) for index in range(7)]


def test_prepare_images_with_a_table_reads_or_resamples_whole_images(tiles, tmp_path):
    folder, options = write_table(tiles, tmp_path)
    keys = {"task": "classification", "block": 128, "options": options}
    original, same, small = (prepare(tile_dataset(tiles, chip=chip, **keys), tmp_path) for chip in (0, 128, 64))
    assert original.classes == ("farm", "forest")
    assert len(original.sample) == 48
    sample = original.read_sample("images/tile_0000_0128")
    assert sample.label == 1
    with rasterio.open(folder / "images/tile_0000_0128.tif") as file:
        np.testing.assert_array_equal(sample.image, file.read())
    assert small.read_sample("images/tile_0000_0128").image.shape == (3, 64, 64)
    # All have the file's corner, with pixels of 10 m or 20 m.
    index = small.sample.index("images/tile_0000_0128")
    for dataset, pixel in ((original, 10), (same, 10), (small, 20)):
        with rasterio.open(folder / "images/tile_0000_0128.tif") as file:
            assert dataset.crs[index] == file.crs.to_wkt()
            expected = (pixel, 0, file.transform.c, 0, -pixel, file.transform.f)
        assert tuple(dataset.transform[index]) == pytest.approx(expected)
    assert "64 px" in small.notes[0]
    assert not same.notes
    summary = image_writer.write(original, tmp_path / "scratch", tmp_path / "store", workers=1)
    assert sum(summary.counts.values()) == 48


def test_prepare_table_with_splits_and_several_labels(tiles, tmp_path):
    splits = (["train"] * 4 + ["val", "test"]) * 8
    _, options = write_table(tiles, tmp_path, split=splits, label=["farm|forest", "farm", ""] * 16)
    options |= {"split": "column"}
    dataset = prepare(tile_dataset(tiles, task="multilabel", chip=0, block=0, splits=None, options=options), tmp_path)
    assert dataset.split == splits
    labels = [dataset.read_sample(name).label.tolist() for name in dataset.sample[:3]]
    assert labels == [[1, 1], [1, 0], [0, 0]]


def test_prepare_scene_chips_keep_crs_and_transform(raw_folder, tmp_path):
    dataset = prepare(scene_dataset(raw_folder), tmp_path)
    image_writer.write(dataset, tmp_path / "scratch", tmp_path / "store", workers=1)
    images = image_store.open_images(tmp_path / "store")
    with rasterio.open(next(raw_folder("osm_landuse").glob("*_B02.jp2"))) as scene:
        for index in (0, 40, 71):
            column, row = (int(images.sample[index].item()[digits]) for digits in (slice(7, 12), slice(1, 6)))
            expected = scene.transform @ rasterio.Affine.translation(column, row)
            assert rasterio.CRS.from_wkt(images.crs[index].item()) == scene.crs
            assert images.transform[index].values.tolist() == pytest.approx(list(expected)[:6])


def test_fetch_digest_depends_on_every_file(tiles, tmp_path, params):
    folder = copy_tiles(tiles, tmp_path)
    before = custom.fetch(tile_dataset(folder), params)
    assert before["files"] == 96
    rewrite_raster(folder / "masks/tile_0000_0000_mask.tif", lambda values: values * 0)
    after = custom.fetch(tile_dataset(folder), params)
    assert after["content_sha256"] != before["content_sha256"]


def test_documented_datasets_are_valid_and_the_first_one_is_prepared(raw_folder, tmp_path):
    text = (ROOT / "docs/own-data.md").read_text()
    blocks = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])["datasets"]
    assert list(blocks) == ["my-scene", "my-tiles", "my-chips"]
    datasets = {name: parse(DatasetConfig, block, name) for name, block in blocks.items()}
    for name, dataset in datasets.items():
        validate(name, dataset)
    dataset = prepare(with_options(datasets["my-scene"], folder=str(raw_folder("osm_landuse"))), tmp_path)
    assert dataset.classes == ("farm", "forest", "meadow", "water")
    assert dataset.shape == (3, 128, 128)
    assert {*dataset.split} == {"train", "val", "test"}


# Pixels without data


@pytest.mark.parametrize("task", ["classification", "multilabel", "segmentation"])
def test_prepare_chips_without_data_are_skipped(tiles, tmp_path, task):
    folder, changes = copy_tiles(tiles, tmp_path), {"task": task, "chip": 32, "options": {"purity": 0.05}}
    before = prepare(tile_dataset(tiles, **changes), tmp_path)
    tile = first_row_chip(before)[:-13]
    set_nodata(folder / f"images/{tile}.tif", 64)
    after = prepare(tile_dataset(folder, **changes), tmp_path)
    top = [name for name in before.sample if name.startswith(tile) and name[-11:-6] in ("00000", "00032")]
    assert top
    assert {*before.sample} - {*after.sample} == {*top}
    assert len(after.notes) > 0


def test_prepare_purity_counts_pixels_without_data(tiles, tmp_path):
    folder = copy_tiles(tiles, tmp_path)
    before = prepare(tile_dataset(tiles, task="classification", chip=32), tmp_path)
    name = first_row_chip(before)
    set_nodata(folder / f"images/{name[:-13]}.tif", 24)
    after = prepare(tile_dataset(folder, task="classification", chip=32), tmp_path)
    missing = {*before.sample} - {*after.sample}
    assert name in missing
    assert all(other.startswith(f"{name[:-13]}_r00000") for other in missing)


def test_prepare_pixel_without_data_in_one_band_has_no_label(tiles, tmp_path):
    folder = copy_tiles(tiles, tmp_path)
    before = prepare(tile_dataset(tiles), tmp_path)
    name = first_row_chip(before, lambda name: (before.read_sample(name).label[:8] != IGNORE).any())
    set_nodata(folder / f"images/{name[:-13]}.tif", 8, bands=2)
    mask = prepare(tile_dataset(folder), tmp_path).read_sample(name).label
    assert (mask[:8] == IGNORE).all()
    np.testing.assert_array_equal(mask[8:], before.read_sample(name).label[8:])


@pytest.mark.parametrize("kind", ["declared", "NaN"])
def test_prepare_pixels_without_data_get_the_mean_of_the_others(tiles, tmp_path, kind):
    folder = copy_tiles(tiles, tmp_path)
    before = prepare(tile_dataset(tiles), tmp_path)
    name = first_row_chip(before)
    path = folder / f"images/{name[:-13]}.tif"
    if kind == "declared":
        set_nodata(path, 8, bands=2)
    else:

        def change(values):
            values = values.astype("float32")
            values[2, :8] = np.nan
            return values

        rewrite_raster(path, change)
    after = prepare(tile_dataset(folder), tmp_path)
    pixels, valid = after.read_sample(name).image, before.read_sample(name).image[:, 8:]
    np.testing.assert_array_equal(pixels[:, 8:], valid)
    assert (np.ptp(pixels[:, :8], axis=(1, 2)) == 0).all()
    np.testing.assert_allclose(pixels[:, 0, 0], valid.mean(axis=(1, 2)), atol=0.5 if kind == "declared" else 1e-2)
    assert (after.read_sample(name).label[:8] == IGNORE).all()
    assert len([note for note in after.notes if "mean" in note]) == 1
    assert not any("mean" in note for note in before.notes)


def test_prepare_chips_equal_what_maps_read(tiles, tmp_path):
    folder = copy_tiles(tiles, tmp_path)
    name = next(name for name in prepare(tile_dataset(tiles), tmp_path).sample if name[-11:] == "00000c00000")
    path = folder / f"images/{name[:-13]}.tif"
    set_nodata(path, 8)
    scene = open_scene.scene_from_rasters(
        [path], parse(open_scene.SceneConfig, {"images": "", "units": "dn", "bands": BLUE_GREEN_RED})
    )
    values, is_valid = scene.read_window(rasterio.windows.Window(0, 0, 64, 64), [0, 1, 2])
    chip = prepare(tile_dataset(folder), tmp_path).read_sample(name).image
    np.testing.assert_array_equal(chip, fill_nodata(values, is_valid))
    assert (values[:, :8] != chip[:, :8]).all()


def test_read_sample_labelled_image_without_data_is_refused(tiles, tmp_path):
    folder, dataset = table_dataset(tiles, tmp_path)
    path = folder / "images/tile_0000_0000.tif"
    set_nodata(path, 128)
    prepared = prepare(dataset, tmp_path)
    with raises(UserError, key="images/tile_0000_0000", path=path):
        prepared.read_sample("images/tile_0000_0000")


# Several dtypes and units


@pytest.mark.parametrize("first", ["uint8", "float32"])
def test_prepare_images_of_several_dtypes_are_stored_as_one(tiles, tmp_path, first):
    folder = copy_tiles(tiles, tmp_path)
    for dtype, name in ((first, "tile_0000_0000"), ({"uint8": "float32"}.get(first, "uint8"), "tile_0640_0896")):
        rewrite_raster(folder / f"images/{name}.tif", lambda values, dtype=dtype: (values // 16).astype(dtype))
    dataset = prepare(tile_dataset(folder), tmp_path)
    assert dataset.dtype == np.float32
    assert any("float32, uint16, uint8" in note for note in dataset.notes)
    image_writer.write(dataset, tmp_path / "scratch", tmp_path / "store", workers=1)


def test_prepare_complex_pixels_are_refused(tiles, tmp_path):
    folder = copy_tiles(tiles, tmp_path)
    path = folder / "images/tile_0000_0128.tif"
    rewrite_raster(path, lambda values: values.astype("complex64"))
    with raises(UserError, key="dtype", value="complex64", path=path):
        prepare(tile_dataset(folder), tmp_path)


def test_write_impossible_units_are_refused_and_write_nothing(tiles, tmp_path):
    dataset = prepare(tile_dataset(tiles, options={"units": "reflectance"}), tmp_path)
    with raises(UserError, "B02", key="units", value="reflectance"):
        image_writer.write(dataset, tmp_path / "scratch", tmp_path / "store", workers=1)
    assert not (tmp_path / "store").exists()


def test_write_undeclared_nodata_value_is_refused(tiles, tmp_path):
    folder = copy_tiles(tiles, tmp_path)
    for index, path in enumerate(sorted((folder / "images").iterdir())):
        empty_columns = 0 if index % 3 else 40
        rewrite_raster(
            path,
            lambda values, columns=empty_columns: np.where(np.arange(128) < columns, -9999, values / 1e4).astype(
                "float32"
            ),
        )
    dataset = prepare(tile_dataset(folder, options={"units": "reflectance"}), tmp_path)
    with raises(UserError, "-a_nodata", key="B02"):
        image_writer.write(dataset, tmp_path / "scratch", tmp_path / "store", workers=1)


# Skipped files and notes


def test_prepare_notes_list_what_is_skipped(tiles, tmp_path):
    folder, dataset = table_dataset(tiles, tmp_path)
    frame = pd.read_csv(folder / "labels.csv")
    frame[:-5].to_csv(folder / "labels.csv", index=False)
    rewrite_raster(folder / "images/tile_0000_0128.tif", crs=None)
    notes = " ".join(prepare(dataset, tmp_path).notes)
    assert "5 of 48 images" in notes
    assert "1 images, such as tile_0000_0128.tif" in notes
    folder = copy_tiles(tiles, tmp_path)
    for name in ("images/tile_0000_0000", "masks/tile_0000_0000_mask"):
        rewrite_raster(folder / f"{name}.tif", lambda values: values[:, :40], height=40)
    assert any("1 images, such as tile_0000_0000," in note for note in prepare(tile_dataset(folder), tmp_path).notes)


def test_prepare_notes_list_classes_that_a_split_lacks(tiles, tmp_path):
    splits = (["train"] * 4 + ["val", "test"]) * 8
    labels = ["water" if index < 4 else ("farm", "forest")[index % 2] for index in range(48)]
    _, options = write_table(tiles, tmp_path, split=splits, label=labels)
    options |= {"split": "column"}
    dataset = tile_dataset(tiles, task="classification", chip=0, block=0, splits=None, options=options)
    notes = prepare(dataset, tmp_path).notes
    assert [note.split(" has nothing of ") for note in notes] == [
        ["the split val", "forest, water"], ["the split test", "farm, water"]
    ]  # fmt: skip


def test_prepare_damaged_files_are_refused_or_skipped(tiles, tmp_path):
    folder, dataset = table_dataset(tiles, tmp_path)
    (folder / "images/tile_0000_0000.tif").write_bytes(b"")
    with raises(UserError, path=folder / "images/tile_0000_0000.tif"):
        prepare(dataset, tmp_path)
    prepared = prepare(with_options(dataset, skip_bad=True), tmp_path)
    assert len(prepared.sample) == 47
    assert prepared.notes[0].startswith("skipped: ")
    folder = copy_tiles(tiles, tmp_path)
    for path in [*(folder / "images").iterdir()][:2]:
        path.write_bytes(b"")
    for path in [*(folder / "masks").iterdir()][-3:]:
        path.write_bytes(path.read_bytes()[:600])
    dataset = tile_dataset(folder, options={"skip_bad": True})
    assert len([note for note in prepare(dataset, tmp_path).notes if note.startswith("skipped: ")]) == 5
    for path in (folder / "images").iterdir():
        path.write_bytes(b"")
    with raises(UserError, "images/tile_"):
        prepare(dataset, tmp_path)


def test_write_damaged_image_is_refused_or_skipped(tiles, tmp_path):
    folder, dataset = table_dataset(tiles, tmp_path)
    prepared, path = prepare(dataset, tmp_path), folder / "images/tile_0000_0128.tif"
    path.write_bytes(path.read_bytes()[:3000])
    with raises(UserError, path=path):
        image_writer.write(prepared, tmp_path / "scratch", tmp_path / "store", workers=1)
    summary = image_writer.write(prepared, tmp_path / "scratch", tmp_path / "store", workers=1, skip_bad=True)
    assert list(summary.skipped) == ["images/tile_0000_0128"]


# Refused configurations


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"options": {"images": "images/*.tiff"}}, {"key": "folder", "value": "images/*.tiff",
                                                    "allowed": ("images", "masks")}),
        ({"options": {"images": "/tmp/*.tif"}}, {"key": "folder", "value": "/tmp/*.tif"}),
        ({"options": {"labels": "images/*.tif"}}, {"key": "labels", "value": "images/*.tif"}),
        ({"options": {"bands": BANDS}}, {"key": "bands", "value": 3, "allowed": [13]}),
        ({"options": {"classes": []}}, {"key": "classes"}),
        ({"options": {"classes": ["farm"]}}, {"key": "classes", "allowed": range(1)}),
        ({"chip": 256}, {"key": "chip", "value": 256}),
        ({"block": 1024}, {"key": "block"}),
    ],
    ids=["no such files", "absolute path", "images as labels", "bands", "no classes", "values", "chip", "block"],
)  # fmt: skip
def test_prepare_dataset_that_does_not_fit_its_files_is_refused(tiles, tmp_path, changes, fields):
    with raises(UserError, **fields):
        prepare(tile_dataset(tiles, **changes), tmp_path)


def test_prepare_one_class_is_refused(tiles, tmp_path):
    _, dataset = table_dataset(tiles, tmp_path, b"file,label\ntile_0000_0000,farm\n")
    with raises(UserError, key="classes", value=("farm",)):
        prepare(dataset, tmp_path)


def test_prepare_images_of_several_sizes_need_a_chip(tiles, tmp_path):
    folder, dataset = table_dataset(tiles, tmp_path)
    path = folder / "images/tile_0000_0000.tif"
    rewrite_raster(path, lambda values: values[:, :100, :100], height=100, width=100)
    with raises(UserError, path, "100 x 100", key="chip", allowed=[(100, 100), (128, 128)]):
        prepare(dataset, tmp_path)
    _, resized = table_dataset(tiles, tmp_path / "b", chip=64)
    assert prepare(with_options(resized, folder=str(folder)), tmp_path).shape == (3, 64, 64)


def test_prepare_folder_names_are_not_patterns_and_folders_are_not_images(tiles, tmp_path):
    folder = copy_tiles(tiles, tmp_path).rename(tmp_path / "br[1]")
    (folder / "images/folder.tif").mkdir()
    assert prepare(tile_dataset(folder), tmp_path).sample == prepare(tile_dataset(tiles), tmp_path).sample
