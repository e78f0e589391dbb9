"""Images without labels in custom data: from files to a store, and what is refused."""

import dataclasses

import numpy as np
import pytest
import rasterio

from pipeline.data.image_store import UNLABELLED
from pipeline.data.sources import custom
from pipeline.errors import UserError
from pipeline.tasks import IGNORE
from tests.errors import raises
from tests.pipeline.data.sources.custom import custom_data
from tests.pipeline.data.sources.custom.custom_data import prepare, table_dataset, tile_dataset, write_windows

# Four next to the labelled tiles, two that overlap them and their blocks.
CORNERS = [(0, 1024), (0, 1152), (0, 1280), (0, 1408), (192, 192), (448, 704)]


@pytest.fixture
def folder(raw_folder, folder):
    """The labelled tiles, and six unlabelled images in the folder `unlabelled`."""
    write_windows(raw_folder, folder, CORNERS)
    return folder


def with_unlabelled(dataset):
    return custom_data.with_options(dataset, unlabelled="unlabelled/*.tif")


def test_unlabelled_samples_are_named_by_file_and_read_where_they_lie(folder, tmp_path):
    dataset = prepare(with_unlabelled(tile_dataset(folder)), tmp_path)
    name = "unlabelled/tile_0000_1152.tif_r00064c00000"
    index = dataset.sample.index(name)
    with rasterio.open(folder / "unlabelled/tile_0000_1152.tif") as file:
        np.testing.assert_array_equal(dataset.read_sample(name).image, file.read()[:, 64:, :64])
        expected = file.transform @ rasterio.Affine.translation(0, 64)
    assert tuple(dataset.transform[index]) == tuple(expected)[:6]
    assert dataset.split[index] == UNLABELLED
    assert (dataset.read_sample(name).label == IGNORE).all()
    assert len([note for note in dataset.notes if " of 24 unlabelled chips overlap with val or test" in note]) == 1


def test_unlabelled_samples_that_overlap_training_chips_are_not_noted(raw_folder, tiles, tmp_path):
    columns = {"split": ["train"] * 40 + ["val"] * 4 + ["test"] * 4}
    folder, config = table_dataset(tiles, tmp_path, columns, block=0, splits=None, options={"split": "column"})
    write_windows(raw_folder, folder, [(0, 0), (0, 128), (640, 0), (640, 512), (640, 896)])
    notes = prepare(with_unlabelled(config), tmp_path).notes
    assert [note[:7] for note in notes if "unlabelled" in note] == ["3 of 5 "]


def test_unlabelled_samples_damaged_or_with_nodata_are_skipped(raw_folder, folder, tmp_path):
    write_windows(raw_folder, folder, [(0, 1024)], nodata=0)
    with rasterio.open(folder / "unlabelled/tile_0000_1024.tif", "r+") as file:
        values = file.read()
        values[:, :10, :10] = 0
        file.write(values)
    (folder / "unlabelled/tile_0000_1280.tif").write_bytes(b"")
    dataset = prepare(with_unlabelled(tile_dataset(folder, options={"skip_bad": True})), tmp_path)
    assert any(note.startswith("1 of 20 unlabelled chips") for note in dataset.notes)
    assert any(note.startswith("skipped: ") and "tile_0000_1280" in note for note in dataset.notes)
    assert dataset.split.count(UNLABELLED) == 19
    assert "unlabelled/tile_0000_1024.tif_r00000c00000" not in dataset.sample


def test_fetch_digest_depends_on_every_file_and_includes_unlabelled_ones(folder, params):
    config = tile_dataset(folder)
    before, with_files = (custom.fetch(dataset, params) for dataset in (config, with_unlabelled(config)))
    assert (before["files"], with_files["files"]) == (96, 96 + len(CORNERS))
    custom_data.rewrite_raster(folder / "masks/tile_0000_0000_mask.tif", lambda values: values * 0)
    digests = [files["content_sha256"] for files in (before, with_files, custom.fetch(config, params))]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("pattern", "fields"),
    [
        ("images/tile_00*.tif", {"key": "unlabelled", "value": "images/tile_00*.tif"}),
        ("masks/*.tif", {"key": "unlabelled", "value": "masks/*.tif"}),
        ("none/*.tif", {"key": "folder", "value": "none/*.tif", "allowed": ("images", "masks", "unlabelled")}),
    ],
)
def test_unlabelled_files_invalid_pattern_is_refused(folder, tmp_path, pattern, fields):
    with raises(UserError, **fields):
        prepare(tile_dataset(folder, options={"unlabelled": pattern}), tmp_path)


def test_unlabelled_samples_image_without_crs_or_smaller_than_a_chip_is_refused(raw_folder, folder, tmp_path):
    dataset = tile_dataset(folder, options={"unlabelled": "invalid/*.tif"})
    path = folder / "invalid/tile_0000_1024.tif"
    for changes, fields in (
        ({"crs": None}, {"key": "unlabelled", "value": "crs", "path": path}),
        ({"height": 60, "width": 60}, {"key": "unlabelled", "value": "invalid/*.tif"}),
        ({"bands": slice(1, 2)}, {"key": "bands", "value": 1, "allowed": [3], "path": path}),
    ):
        write_windows(raw_folder, folder, CORNERS[:1], "invalid", **changes)
        with raises(UserError, **fields):
            prepare(dataset, tmp_path)


def test_unlabelled_samples_need_a_time_if_all_labelled_images_have_one(raw_folder, tiles, tmp_path):
    folder, config = table_dataset(tiles, tmp_path, {"time": "2017-02-16"})
    write_windows(raw_folder, folder, CORNERS)
    config = with_unlabelled(config)
    with raises(UserError, key="unlabelled", value="time"):
        prepare(config, tmp_path)
    dataset = prepare(custom_data.with_options(config, time="2018-01-01"), tmp_path)
    assert dataset.read_sample("unlabelled/tile_0000_1024.tif").time == np.datetime64("2018-01-01", "s")
    assert dataset.read_sample("images/tile_0000_0000").time == np.datetime64("2017-02-16", "s")


def test_unlabelled_samples_of_another_size_need_a_chip(raw_folder, tiles, tmp_path):
    folder, config = table_dataset(tiles, tmp_path)
    write_windows(raw_folder, folder, CORNERS[1:])
    write_windows(raw_folder, folder, CORNERS[:1], height=100, width=100)
    config, path = with_unlabelled(config), folder / "unlabelled/tile_0000_1024.tif"
    with raises(UserError, key="chip", value=(100, 100), allowed=[(128, 128)], path=path):
        prepare(config, tmp_path)
    assert prepare(dataclasses.replace(config, chip=64), tmp_path).split.count(UNLABELLED) == 6
