"""Own tables, masks, times and values that once gave wrong results without a word: each is right, refused or said."""

import shutil

import numpy as np
import pandas as pd
import pytest

from pipeline.data import image_store, image_writer
from pipeline.errors import UserError
from tests.pipeline.data.sources.custom.test_custom import labelled, prepared, tile_block, tiles
from tests.pipeline.data.sources.custom.test_labels import rewrite
from tests.pipeline.data.sources.custom.test_mistakes import table_block

__all__ = ["tiles"]


@pytest.mark.parametrize("time", ["20170216", "today", "1487240461", "2017-02-16T10:21+01:00", "0001-01-01"])
def test_times_that_numpy_would_take_for_others_are_refused(tiles, tmp_path, time):
    with pytest.raises(UserError, match=f"time is '.*{time[-5:]}'; write it as 2017-02-16"):
        prepared(tile_block(tiles, options={"time": time}), tmp_path)
    folder, options = labelled(tiles, tmp_path, time=time)
    with pytest.raises(UserError, match="the time of tile_0000_0000.tif is '.*'; write it as 2017-02-16"):
        prepared(tile_block(folder, task="classification", chip=0, block=128, options=options), tmp_path)
    for text in ("2017-02-16T10:21:01Z", "2017-02-16 10:21:01+00:00"):
        assert image_store.parse_timestamp(text, "") == np.datetime64("2017-02-16T10:21:01")


def test_values_for_no_data_that_are_not_declared_are_noticed(tiles, tmp_path):
    folder = tmp_path / "tiles"
    shutil.copytree(tiles, folder)
    for path in sorted((folder / "images").iterdir())[::3]:
        rewrite(path, lambda values: np.where(np.arange(128) < 40, -9999, values / 1e4).astype("float32"))
    for path in (path for n, path in enumerate(sorted((folder / "images").iterdir())) if n % 3):
        rewrite(path, lambda values: (values / 1e4).astype("float32"))
    stream = prepared(tile_block(folder, options={"units": "reflectance"}), tmp_path)
    with pytest.raises(UserError, match="has the mean -.*, and no light is below 0.*-a_nodata"):
        image_writer.write(stream, tmp_path / "scratch", tmp_path / "store", workers=1)


def test_pixels_that_are_complex_are_refused_and_several_types_said(tiles, tmp_path):
    folder = tmp_path / "tiles"
    shutil.copytree(tiles, folder)
    rewrite(folder / "images/tile_0000_0000.tif", lambda values: values.astype("float32"))
    said = prepared(tile_block(folder), tmp_path).notes
    assert "images have float32, uint16 values, and are stored as float32" in said
    rewrite(folder / "images/tile_0000_0128.tif", lambda values: values.astype("complex64"))
    with pytest.raises(UserError, match="tile_0000_0128.tif has complex64 values"):
        prepared(tile_block(folder), tmp_path)


def test_masks_in_a_folder_of_another_name_are_of_other_images(tiles, tmp_path):
    for kind, ending in (("images", ""), ("masks", "_mask")):
        for number, path in enumerate(sorted((tiles / kind).iterdir())):
            folder = tmp_path / kind / ("b" if kind == "masks" and number > 40 else "a")
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / f"t{number:02d}{ending}.tif")
    options = {"images": "images/**/*.tif", "labels": "masks/**/*.tif"}
    with pytest.raises(UserError, match=r"images/a/t41.tif has 0 masks"):
        prepared(tile_block(tmp_path, options=options), tmp_path)


def test_images_are_not_their_own_masks(tiles, tmp_path):
    with pytest.raises(UserError, match="both fit .*tile_0000_0000.tif"):
        prepared(tile_block(tiles, options={"labels": "images/*.tif"}), tmp_path)


def test_folders_of_any_name_and_patterns_that_fit_folders(tiles, tmp_path):
    folder = tmp_path / "br[1]"
    shutil.copytree(tiles, folder)
    (folder / "images/more.tif").mkdir()
    assert prepared(tile_block(folder), tmp_path).sample == prepared(tile_block(tiles), tmp_path).sample


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,label\n{},a,b\n", "has rows with more values than columns. Several labels .* joined by"),
        ("file,label,label\n{},a,b\n", "has two columns 'label'"),
        ("file,label\n{},1\n{},1.0\n", "'1' and '1.0', which differ in capitals alone, or in how a number"),
    ],
)
def test_tables_whose_labels_would_be_lost_are_refused(tiles, tmp_path, text, words):
    names = [path.name for path in sorted((tiles / "images").iterdir())]
    head, *rows = text.splitlines(keepends=True)
    body = "".join(rows[number % len(rows)].format(name) for number, name in enumerate(names))
    _, block = table_block(tiles, tmp_path, (head + body).encode())
    with pytest.raises(UserError, match=words):
        prepared(block, tmp_path)


def test_tables_as_programs_write_them(tiles, tmp_path):
    """Empty rows, paths from here or with backslashes, and accents in two forms."""
    names = [path.name for path in sorted((tiles / "images").iterdir())]
    ways = ("./images/{}", "images\\{}", "{}")
    labels = ("for\u00eat", "fore\u0302t", "farm")
    rows = [f"{ways[n % 3].format(name)},{labels[n % 3]}" for n, name in enumerate(names)]
    _, block = table_block(tiles, tmp_path, "\n".join(["file,label", *rows, ",", ""]).encode())
    stream = prepared(block, tmp_path)
    assert (len(stream.sample), stream.classes) == (48, ("farm", "for\u00eat"))


def test_rows_without_a_label_are_left_out_if_asked_for(tiles, tmp_path):
    folder, block = table_block(tiles, tmp_path)
    frame = pd.read_csv(folder / "labels.csv")
    frame.loc[3, "label"] = ""
    frame.to_csv(folder / "labels.csv", index=False)
    with pytest.raises(UserError, match=f"labels.csv: {frame.file[3]} has no label"):
        prepared(block, tmp_path)
    block.options["skip_bad"] = True
    stream = prepared(block, tmp_path)
    assert len(stream.sample) == 47
    assert any(f"has no label for {frame.file[3]}" in note for note in stream.notes)


def test_a_gsd_is_positive(tiles, tmp_path):
    with pytest.raises(UserError, match="gsd is -1; it is in metres"):
        prepared(tile_block(tiles, options={"gsd": -1.0}), tmp_path)


@pytest.mark.parametrize(("ignore", "kind"), [(-1, "int16"), (65535, "uint16")])
def test_masks_may_ignore_what_no_byte_holds(tiles, tmp_path, ignore, kind):
    folder = tmp_path / "tiles"
    shutil.copytree(tiles, folder)
    for path in (folder / "masks").iterdir():
        rewrite(path, lambda mask: np.where(mask == 255, ignore, mask.astype("int32")).astype(kind))
    known = prepared(tile_block(tiles), tmp_path)
    found = prepared(tile_block(folder, options={"ignore": ignore}), tmp_path)
    name = known.sample[0]
    np.testing.assert_array_equal(found.read_sample(name).label, known.read_sample(name).label)


def test_long_numbers_may_be_classes(tiles, tmp_path):
    names = [path.name for path in sorted((tiles / "images").iterdir())]
    rows = [f"{name},330101010{number % 2}" for number, name in enumerate(names)]
    _, block = table_block(tiles, tmp_path, "\n".join(["file,label,label.1", *[f"{row},x" for row in rows]]).encode())
    assert prepared(block, tmp_path).classes == ("3301010100", "3301010101")
