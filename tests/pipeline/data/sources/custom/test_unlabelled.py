"""Images without labels, of people's own data: from files to a store, and what is refused."""

import dataclasses
import functools
import shutil

import numpy as np
import pytest
import rasterio
from rasterio.windows import Window

from pipeline.data import image_store, image_writer
from pipeline.data.sources import custom, osm_landuse
from pipeline.errors import UserError
from tests.pipeline.data.sources.custom.test_custom import labelled, prepared, tile_block, tiles

__all__ = ["tiles"]
NONE = image_store.UNLABELLED
read_scene = functools.cache(osm_landuse.read_scene)


def more(raw, folder, places, name="more", bands=slice(1, 4), **profile):
    """Windows of 128 px of the scene, (row, column), as GeoTIFFs of all bands in a folder below this one."""
    scene, transform, crs = read_scene(raw("osm_landuse"))
    (folder / name).mkdir(parents=True, exist_ok=True)
    for row, column in places:
        values = scene[bands][:, row : row + 128, column : column + 128]
        given = {
            "driver": "GTiff", "height": 128, "width": 128, "count": len(values), "dtype": values.dtype, "crs": crs,
            "transform": rasterio.windows.transform(Window(column, row, 128, 128), transform), **profile,
        }  # fmt: skip
        with rasterio.open(folder / name / f"tile_{row:04d}_{column:04d}.tif", "w", **given) as file:
            file.write(values)


# Beside the labelled tiles; the last two lie on labelled ground, across corners of blocks.
PLACES = [(0, 1024), (0, 1152), (0, 1280), (0, 1408), (192, 192), (448, 704)]


@pytest.fixture
def wider(raw_folder, tiles, tmp_path):
    """The labelled tiles and further images."""
    shutil.copytree(tiles, tmp_path / "wide")
    more(raw_folder, tmp_path / "wide", PLACES)
    return tmp_path / "wide"


def both(block):
    """A description without and with the further images."""
    return block, dataclasses.replace(block, options=block.options | {"unlabelled": "more/*.tif"})


def test_names_are_of_files_and_chips_lie_where_they_were_cut(wider, tmp_path):
    stream = prepared(both(tile_block(wider))[1], tmp_path)
    name = "more/tile_0000_1152.tif_r00064c00000"
    place = stream.sample.index(name)
    with rasterio.open(wider / "more/tile_0000_1152.tif") as file:
        np.testing.assert_array_equal(stream.read_sample(name).image, file.read()[:, 64:, :64])
        assert tuple(stream.transform[place]) == tuple(
            file.transform @ rasterio.Affine.translation(0, 64)
        )[:6]  # fmt: skip
    assert stream.split[place] == NONE
    assert (stream.read_sample(name).label == image_store.IGNORE).all()
    told = [note for note in stream.notes if "share ground with val or test" in note]
    assert len(told) == 1
    assert " of 24 unlabelled chips share ground" in told[0]


def test_the_ground_of_training_chips_is_no_leak(raw_folder, tiles, tmp_path):
    folder, options = labelled(tiles, tmp_path, split=["train"] * 40 + ["val"] * 4 + ["test"] * 4)
    more(raw_folder, folder, [(0, 0), (0, 128), (640, 0), (640, 512), (640, 896)])
    block = tile_block(
        tiles, task="classification", chip=0, block=0, splits=None,
        options=options | {"split": "column", "unlabelled": "more/*.tif"},
    )  # fmt: skip
    notes = [note for note in prepared(block, tmp_path).notes if "unlabelled" in note]
    assert notes == [
        "3 of 5 unlabelled chips share ground with val or test: students see its pixels, though not its labels"
    ]


def test_chips_without_data_are_left_out(raw_folder, wider, tmp_path):
    more(raw_folder, wider, [(0, 1024)], nodata=0)
    path = wider / "more/tile_0000_1024.tif"
    with rasterio.open(path, "r+") as file:
        values = file.read()
        values[:, :10, :10] = 0
        file.write(values)
    stream = prepared(both(tile_block(wider))[1], tmp_path)
    assert "1 of 24 unlabelled chips have pixels without data, and are left out" in stream.notes
    assert stream.split.count(NONE) == 23
    assert "more/tile_0000_1024.tif_r00000c00000" not in stream.sample


def test_the_digest_of_the_files_follows_them(wider, params):
    plain, wide = both(tile_block(wider))
    one, two = (custom.fetch(block, params) for block in (plain, wide))
    assert two["files"] == one["files"] + len(PLACES)
    assert one["content_sha256"] != two["content_sha256"]


REFUSED = {
    "of images": (
        {"unlabelled": "images/tile_00*.tif"},
        r"unlabelled \(images/tile_00\*.tif\) and images \(.*8 files",
    ),
    "of labels": ({"unlabelled": "masks/*.tif"}, r"unlabelled .* and labels .*48 files.* a folder of their own"),
    "nothing": ({"unlabelled": "none/*.tif"}, r"has no file like none/\*.tif. It has: images, masks, more"),
    "an absolute path": ({"unlabelled": "/more/*.tif"}, "is an absolute path"),
    "other bands": ({"unlabelled": "single/*.tif"}, "has 1 bands, and 3 are described"),
    "no place": ({"unlabelled": "nowhere/*.tif"}, "states no coordinate reference system, and the labelled images"),
    "damaged": ({"unlabelled": "torn/*.tif"}, "tile_0000_1024.tif cannot be read"),
    "too small": ({"unlabelled": "small/*.tif"}, r"No image of unlabelled \(small/\*.tif\) has 64 x 64 px"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(raw_folder, wider, tmp_path, what):
    more(raw_folder, wider, PLACES[:1], "single", slice(1, 2))
    more(raw_folder, wider, PLACES[:1], "nowhere", crs=None)
    more(raw_folder, wider, PLACES[:1], "torn")
    torn = wider / "torn/tile_0000_1024.tif"
    torn.write_bytes(torn.read_bytes()[:100])
    more(raw_folder, wider, PLACES[:1], "small", height=60, width=60) if what == "too small" else None
    options, words = REFUSED[what]
    if what == "nothing":
        for name in ("single", "nowhere", "torn"):
            shutil.rmtree(wider / name)
    with pytest.raises(UserError, match=words):
        prepared(tile_block(wider, options=options), tmp_path)


def test_tables_whose_further_images_differ_are_refused(raw_folder, tiles, tmp_path):
    folder, options = labelled(tiles, tmp_path / "a", time="2017-02-16")
    more(raw_folder, folder, PLACES)
    block = both(tile_block(tiles, task="classification", chip=0, block=128, options=options))[1]
    with pytest.raises(UserError, match="labelled images all have a time.*State theirs as time"):
        prepared(block, tmp_path)
    block = dataclasses.replace(block, options=block.options | {"time": "2018-01-01"})
    stream = prepared(block, tmp_path)
    assert stream.read_sample("more/tile_0000_1024.tif").time == np.datetime64("2018-01-01", "s")
    assert stream.read_sample("images/tile_0000_0000").time == np.datetime64("2017-02-16", "s")
    path = folder / "more/tile_0000_1024.tif"
    with rasterio.open(path) as file:
        small, profile = file.read(window=Window(0, 0, 100, 100)), {**file.profile, "height": 100, "width": 100}
    with rasterio.open(path, "w", **profile) as file:
        file.write(small)
    with pytest.raises(UserError, match="of unlabelled, has 100 x 100 px, and .* has 128 x 128 px. Give a chip"):
        prepared(block, tmp_path)
    assert prepared(dataclasses.replace(block, chip=64), tmp_path).split.count(NONE) == 6


def test_a_tables_split_of_that_name_makes_no_unlabelled_chip(tiles, tmp_path):
    """Those of a table have labels: another rule deals them, and the rule `column` refuses the name."""
    _, options = labelled(tiles, tmp_path, split=NONE)
    block = tile_block(tiles, task="classification", chip=0, block=128, options=options)
    stream = prepared(block, tmp_path)
    assert NONE not in stream.split
    assert stream.read_sample("images/tile_0000_0128").label == 1
    with pytest.raises(UserError, match="is 'unlabelled'; it must be one of train, val, test"):
        prepared(dataclasses.replace(block, options=block.options | {"split": "column"}), tmp_path)


def test_damaged_ones_are_left_out_if_asked_for(wider, tmp_path):
    (wider / "more/tile_0000_1024.tif").write_bytes(b"")
    block = both(tile_block(wider, options={"skip_bad": True}))[1]
    stream = prepared(block, tmp_path)
    assert stream.split.count(NONE) == 20
    assert any(note.startswith("left out: ") and "tile_0000_1024" in note for note in stream.notes)


def test_a_store_holds_no_label_of_an_unlabelled_chip(wider, tmp_path):
    stream = prepared(both(tile_block(wider))[1], tmp_path)
    name = stream.sample[-1]
    stream.read_sample.chips[name] = dataclasses.replace(stream.read_sample.chips[stream.sample[0]])
    with pytest.raises(UserError, match="Sample more/.*: A sample of the split unlabelled has a label"):
        image_writer.write(stream, tmp_path / "scratch", tmp_path / "store", workers=1)
    assert not (tmp_path / "store").exists()
