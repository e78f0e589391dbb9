"""Custom data end to end: a scene with polygons, images with masks, images with a table."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import rasterio
import yaml
from rasterio.windows import Window

from pipeline.config import DatasetConfig, parse
from pipeline.data import image_store, image_writer
from pipeline.data.sources import osm_landuse, validate
from pipeline.data.splits import fill_nodata
from pipeline.errors import UserError
from pipeline.mapping import scene as open_scene
from pipeline.tasks import IGNORE
from tests.conftest import ROOT
from tests.errors import raises
from tests.pipeline.data.sources.custom import custom_data
from tests.pipeline.data.sources.custom.custom_data import prepare, rewrite_raster, table_dataset, tile_dataset

TILE = "images/tile_0128_0256.tif"


def test_prepare_scene_with_polygons_equals_the_osm_landuse_source(prepared_scene, raw_folder, image_dataset):
    dataset, expected = prepared_scene, image_dataset("sample-landuse-seg")
    assert len(dataset.sample) == len(expected.sample) == 72
    renumber = np.full(256, IGNORE)
    names = ["meadow" if name == "grass" else name for name in dataset.classes]
    renumber[: len(names)] = [expected.classes.index(name) for name in names]
    _, grid, crs = osm_landuse.read_scene(raw_folder("osm_landuse"))
    (note,) = [note for note in dataset.notes if "finest grid" in note]
    assert ("_B11.jp2" in note, "_B02.jp2" in note) == (True, False)
    for index in (0, 30, 71):
        name = dataset.sample[index]
        sample = dataset.read_sample(name)
        np.testing.assert_array_equal(sample.image, expected.image[index])
        np.testing.assert_array_equal(renumber[sample.label], expected.label[index])
        assert (sample.lat, sample.lon) == pytest.approx((expected.lat[index], expected.lon[index]))
        assert sample.time == expected.time[index]
        corner = rasterio.Affine.translation(int(name[7:12]), int(name[1:6]))
        assert dataset.transform[index].tolist() == pytest.approx(list(grid @ corner)[:6])
        assert rasterio.CRS.from_wkt(dataset.crs[index]) == crs


def test_prepare_images_with_masks_reads_chips_of_both(prepared_tiles, tiles, tmp_path):
    dataset, name = prepared_tiles, "tile_0128_0256_r00064c00064"
    assert dataset.shape == (3, 64, 64)
    sample = dataset.read_sample(name)
    with rasterio.open(tiles / TILE) as file:
        np.testing.assert_array_equal(sample.image, file.read()[:, 64:, 64:])
    with rasterio.open(tiles / "masks/tile_0128_0256_mask.tif") as file:
        np.testing.assert_array_equal(sample.label, file.read(1)[64:, 64:])
    classified = prepare(tile_dataset(tiles, task="classification", chip=32), tmp_path)
    assert all((classified.read_sample(name).label < 7).all() for name in classified.sample[:9])
    assert "60%" in classified.notes[0]
    multilabel = prepare(tile_dataset(tiles, task="multilabel"), tmp_path)
    assert multilabel.read_sample(name).label.tolist() == [int((sample.label == index).any()) for index in range(7)]


def test_prepare_images_with_a_table_reads_or_resamples_whole_images(tiles, tmp_path):
    folder, config = table_dataset(tiles, tmp_path)
    name = "images/tile_0000_0128"
    for chip, side, pixel in ((0, 128, 10), (128, 128, 10), (64, 64, 20)):
        dataset = prepare(dataclasses.replace(config, chip=chip), tmp_path)
        assert (dataset.classes, len(dataset.sample)) == (("farm", "forest"), 48)
        assert any(f"resampled to {chip} px" in note for note in dataset.notes) == (side == 64)
        sample, index = dataset.read_sample(name), dataset.sample.index(name)
        assert (sample.label, sample.image.shape) == (1, (3, side, side))
        with rasterio.open(folder / f"{name}.tif") as file:
            assert side == 64 or (sample.image == file.read()).all()
            assert dataset.crs[index] == file.crs.to_wkt()
            expected = (pixel, 0, file.transform.c, 0, -pixel, file.transform.f)
        assert tuple(dataset.transform[index]) == pytest.approx(expected)


def test_write_prepared_table_with_splits_and_several_labels(tiles, tmp_path):
    splits = (["train"] * 4 + ["val", "test"]) * 8
    columns = {"split": splits, "label": ["farm|forest", "farm", ""] * 16}
    keys = {"task": "multilabel", "block": 0, "splits": None, "options": {"split": "column"}}
    dataset = prepare(table_dataset(tiles, tmp_path, columns, **keys)[1], tmp_path)
    image_writer.write(dataset, tmp_path / "scratch", tmp_path / "store", workers=1)
    images = image_store.open_images(tmp_path / "store")
    assert images.split.values.tolist() == splits
    assert images.label.values[:3].tolist() == [[1, 1], [1, 0], [0, 0]]


def test_documented_datasets_are_valid_and_the_first_one_is_prepared(raw_folder, tmp_path):
    text = (ROOT / "docs/own-data.md").read_text()
    blocks = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])["datasets"]
    assert list(blocks) == ["my-scene", "my-tiles", "my-chips"]
    datasets = {name: parse(DatasetConfig, block, name) for name, block in blocks.items()}
    for name, dataset in datasets.items():
        validate(name, dataset)
    dataset = prepare(custom_data.with_options(datasets["my-scene"], folder=str(raw_folder("osm_landuse"))), tmp_path)
    assert dataset.classes == ("farm", "forest", "meadow", "water")
    assert dataset.shape == (3, 128, 128)
    assert {*dataset.split} == {"train", "val", "test"}


@pytest.mark.parametrize(
    ("task", "rows", "purity"), [("multilabel", 64, 0.05), ("segmentation", 64, 0.05), ("classification", 24, 0.6)]
)
def test_prepare_chips_without_data_or_pure_class_are_skipped(tiles, folder, tmp_path, task, rows, purity):
    options = {"purity": purity, "images": "images/tile_0[0-2]*_0[0-4]*.tif"}
    changes = {"task": task, "chip": 32, "block": 128, "options": options}
    before = prepare(tile_dataset(tiles, **changes), tmp_path)
    tile = next(name for name in before.sample if name[-11:-6] == "00000")[:-13]
    custom_data.set_nodata(folder / f"images/{tile}.tif", rows)
    after = prepare(tile_dataset(folder, **changes), tmp_path)
    edges = ("00000", "00032")[: -(-rows // 32)]
    top = {name for name in before.sample if name.startswith(tile) and name[-11:-6] in edges}
    assert top
    assert {*before.sample} - {*after.sample} == top
    assert after.notes


@pytest.mark.parametrize("kind", ["declared", "NaN"])
def test_prepare_pixels_without_data_have_no_label_and_the_mean_of_the_others(prepared_tiles, folder, tmp_path, kind):
    before = prepared_tiles
    edge = [name for name in before.sample if name[-11:-6] == "00000"]
    name = next(name for name in edge if (before.read_sample(name).label[:8] != IGNORE).any())
    path = folder / f"images/{name[:-13]}.tif"
    custom_data.set_nodata(path, 8, bands=2, **{} if kind == "declared" else {"value": np.nan, "dtype": "float32"})
    after = prepare(tile_dataset(folder), tmp_path)
    sample, expected = after.read_sample(name), before.read_sample(name)
    np.testing.assert_array_equal(sample.image[:, 8:], expected.image[:, 8:])
    assert (np.ptp(sample.image[:, :8], axis=(1, 2)) == 0).all()
    mean = expected.image[:, 8:].mean(axis=(1, 2))
    np.testing.assert_allclose(sample.image[:, 0, 0], mean, atol=0.5 if kind == "declared" else 1e-2)
    assert (sample.label[:8] == IGNORE).all()
    np.testing.assert_array_equal(sample.label[8:], expected.label[8:])
    assert [any("mean" in note for note in dataset.notes) for dataset in (before, after)] == [False, True]
    assert any("float32, uint16" in note for note in after.notes) == (kind == "NaN")
    assert after.dtype == (np.uint16 if kind == "declared" else np.float32)
    scene_config = parse(open_scene.SceneConfig, {"images": "", "units": "dn", "bands": custom_data.BLUE_GREEN_RED})
    scene = open_scene.scene_from_rasters([path], scene_config)
    values, is_valid = scene.read_window(Window(int(name[-5:]), 0, 64, 64), [0, 1, 2])
    np.testing.assert_array_equal(sample.image, fill_nodata(values, is_valid))


def test_read_sample_image_without_data_or_damaged_is_refused(tiles, tmp_path):
    folder, dataset = table_dataset(tiles, tmp_path)
    empty, damaged = (folder / f"images/tile_0000_{column}.tif" for column in ("0000", "0128"))
    custom_data.set_nodata(empty, 128)
    prepared = prepare(dataset, tmp_path)
    with raises(UserError, key="images/tile_0000_0000", path=empty):
        prepared.read_sample("images/tile_0000_0000")
    damaged.write_bytes(damaged.read_bytes()[:3000])
    with raises(UserError, path=damaged):
        prepared.read_sample("images/tile_0000_0128")
    rewrite_raster(empty, lambda values: values.astype("complex64"))
    with raises(UserError, key="dtype", value="complex64", path=empty):
        prepare(dataset, tmp_path)


def test_prepare_table_notes_list_what_is_skipped_and_missing(tiles, tmp_path):
    folder, dataset = table_dataset(tiles, tmp_path)
    frame = pd.read_csv(folder / "labels.csv")
    splits = ["train"] * 40 + ["val"] * 2 + ["test"] * 6
    labels = ["water", *frame.label[1:40], "farm", "farm", *frame.label[42:]]
    frame.assign(split=splits, label=labels)[:-2].to_csv(folder / "labels.csv", index=False)
    rewrite_raster(folder / "images/tile_0000_0128.tif", crs=None)
    (folder / "images/tile_0000_0256.tif").write_bytes(b"")
    with raises(UserError, path=folder / "images/tile_0000_0256.tif"):
        prepare(dataset, tmp_path)
    dataset = custom_data.with_options(dataset, skip_bad=True)
    prepared = prepare(custom_data.with_options(dataset, split="column"), tmp_path)
    assert len(prepared.sample) == 45
    assert (prepared.crs, prepared.transform) == (None, None)
    notes = " ".join(prepared.notes)
    assert prepared.notes[0].startswith("skipped: ")
    assert "2 of 48 images" in notes
    assert "1 images, such as tile_0000_0128.tif" in notes
    assert "the split val has nothing of forest, water" in notes
    assert "column split is not used" in " ".join(prepare(dataset, tmp_path).notes)


def test_prepare_masks_notes_list_what_is_skipped(folder, tmp_path):
    for name in ("images/tile_0000_0000", "masks/tile_0000_0000_mask"):
        rewrite_raster(folder / f"{name}.tif", lambda values: values[:, :40], height=40)
    (folder / "images/tile_0000_0128.tif").write_bytes(b"")
    mask = folder / "masks/tile_0640_0896_mask.tif"
    mask.write_bytes(mask.read_bytes()[:600])
    (folder / "images/folder.tif").mkdir()
    notes = prepare(tile_dataset(folder.rename(tmp_path / "br[1]"), options={"skip_bad": True}), tmp_path).notes
    assert len([note for note in notes if note.startswith("skipped: ")]) == 2
    assert any("1 images, such as tile_0000_0000," in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"options": {"images": "images/*.tiff"}}, {"key": "folder", "value": "images/*.tiff",
                                                    "allowed": ("images", "masks")}),
        ({"options": {"images": "/tmp/*.tif"}}, {"key": "folder", "value": "/tmp/*.tif"}),
        ({"options": {"labels": "images/*.tif"}}, {"key": "labels", "value": "images/*.tif"}),
        ({"options": {"bands": custom_data.BANDS}}, {"key": "bands", "value": 3, "allowed": [13]}),
        ({"options": {"classes": []}}, {"key": "classes"}),
        ({"options": {"classes": ["farm"]}}, {"key": "classes", "allowed": range(1)}),
        ({"chip": 256}, {"key": "chip", "value": 256}),
        ({"block": 1024}, {"key": "block"}),
    ],
)  # fmt: skip
def test_prepare_dataset_that_does_not_fit_its_files_is_refused(tiles, tmp_path, changes, fields):
    with raises(UserError, **fields):
        prepare(tile_dataset(tiles, **changes), tmp_path)


def test_prepare_images_of_several_sizes_need_a_chip(tiles, tmp_path):
    folder, dataset = table_dataset(tiles, tmp_path)
    path = folder / "images/tile_0000_0128.tif"
    rewrite_raster(path, lambda values: values[:, :100, :100], height=100, width=100)
    with raises(UserError, path, "100 x 100", key="chip", value=(100, 100), allowed=[(128, 128)], path=path):
        prepare(dataset, tmp_path)
    assert prepare(dataclasses.replace(dataset, chip=64), tmp_path).shape[1] == 64
