"""Mistakes in blocks, tables and images of one's own: each is refused in words, or said in the store's notes."""

import dataclasses
import shutil
import unicodedata

import pandas as pd
import pytest
import rasterio
from rasterio.windows import Window

from pipeline.data import image_writer
from pipeline.data.sources import osm_landuse
from pipeline.errors import UserError
from tests.pipeline.data.sources.custom.test_custom import (
    BANDS,
    THREE,
    labelled,
    prepared,
    scene_block,
    tile_block,
    tiles,
)

__all__ = ["tiles"]


def table_block(tiles, tmp_path, text=None, **changes):
    """The tiles with a table, whose text may be another."""
    folder, options = labelled(tiles, tmp_path)
    if text is not None:
        (folder / "labels.csv").write_bytes(text)
    options |= changes.pop("options", {})
    return folder, tile_block(tiles, **{"task": "classification", "chip": 0, "block": 128} | changes, options=options)


TABLES = {
    b"": "cannot be read as a table",
    b"file,label\n": "has no rows",
    "file,label\ntile_0000_0000,Gewässer\n".encode("latin1"): "cannot be read as a table: 'utf-8'.*CSV, in UTF-8",
    bytes(range(256)) * 20: "cannot be read as a table",
    b"file;label\na;b\n": "has no column 'file'. It has: file;label.*commas",
    b"file,label,time\ntile_0000_0000,farm,16.2.2017\n": "the time of tile_0000_0000 is '16.2.2017'; write it as",
    b"file,label\ntile_0000_0000,farm\n": "one class, farm",
}


@pytest.mark.parametrize("text", TABLES)
def test_tables_that_are_none(tiles, tmp_path, text):
    _, block = table_block(tiles, tmp_path, text)
    with pytest.raises(UserError, match=TABLES[text]):
        prepared(block, tmp_path)


def test_blanks_in_a_table_make_no_classes(tiles, tmp_path):
    names = [path.name for path in sorted((tiles / "images").iterdir())]
    rows = [f"{name}, {('farm ', 'forest')[number % 2]}" for number, name in enumerate(names)]
    _, block = table_block(tiles, tmp_path / "a", "\n".join(["file, label", *rows]).encode())
    assert prepared(block, tmp_path).classes == ("farm", "forest")
    rows = [f"{name},farm | water" for name in names]
    _, block = table_block(tiles, tmp_path / "b", "\n".join(["file,label", *rows]).encode(), task="multilabel")
    assert prepared(block, tmp_path).classes == ("farm", "water")


def test_a_name_that_several_images_have_is_refused(tiles, tmp_path):
    folder, block = table_block(tiles, tmp_path, options={"images": "**/*.tif"})
    (folder / "other").mkdir()
    shutil.copy(folder / "images/tile_0000_0128.tif", folder / "other")
    with pytest.raises(UserError, match="'tile_0000_0128.tif', and several images have that name.*List their paths"):
        prepared(block, tmp_path)
    frame = pd.read_csv(folder / "labels.csv")
    frame.assign(file="images/" + frame.file).to_csv(folder / "labels.csv", index=False)
    assert len(prepared(block, tmp_path).sample) == 48
    with_ending = folder / "images/tile_0000_0000.tiff"
    shutil.copy(folder / "images/tile_0000_0000.tif", with_ending)
    pd.DataFrame({"file": ["tile_0000_0000.tif", "tile_0000_0000.tiff"], "label": ["a", "b"]}).to_csv(
        folder / "labels.csv", index=False
    )
    block = tile_block(
        tiles, task="classification", chip=0, block=128, options=block.options | {"images": "images/*"}
    )
    with pytest.raises(UserError, match="differ in their endings alone"):
        prepared(block, tmp_path)


def test_splits_of_a_table_are_used_or_said_not_to_be(tiles, tmp_path):
    _, block = table_block(tiles, tmp_path / "a", options={"split": "column"})
    with pytest.raises(UserError, match="has no column 'split'. It has: file, label"):
        prepared(block, tmp_path)
    _, options = labelled(tiles, tmp_path / "b", split="train")
    stream = prepared(tile_block(tiles, task="classification", chip=0, block=128, options=options), tmp_path)
    assert "column split is not used, since split is blocks" in stream.notes[0]


OPTIONS = {
    "nanometres": ({"bands": [{**THREE[0], "wavelength": 492}, *THREE[1:]]}, "B02 has the wavelength 492; .*micro"),
    "no size": ({"bands": [{**THREE[0], "gsd": 0}, *THREE[1:]]}, "B02 has the gsd 0"),
    "no bands": ({"bands": []}, "bands is empty"),
    "reversed": ({"display": [0.3, 0.0]}, r"display is \[0.3, 0.0\]"),
    "display in dn": ({"display": [0, 3000]}, r"display is \[0.0, 3000.0\]; .*in reflectance"),
    "a percentage": ({"purity": 60}, "purity is 60"),
    "a class twice": ({"classes": ["farm", "farm"]}, "classes name 'farm' twice"),
    "too many classes": ({"classes": [str(number) for number in range(256)]}, "256 classes; masks hold 255"),
    "an absolute path": ({"images": "/tmp/*.tif"}, "is an absolute path; patterns are below the folder"),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_options_that_cannot_be(tiles, tmp_path, what):
    changes, words = OPTIONS[what]
    with pytest.raises(UserError, match=words):
        prepared(tile_block(tiles, options=changes), tmp_path)


def test_units_that_the_pixels_cannot_have(tiles, tmp_path):
    stream = prepared(tile_block(tiles, options={"units": "reflectance"}), tmp_path)
    with pytest.raises(UserError, match="Band B02 has the mean .* and in reflectance, as units says, 1 is full"):
        image_writer.write(stream, tmp_path / "scratch", tmp_path / "store", workers=1)
    assert not (tmp_path / "store").exists()


def test_damaged_headers_and_masks_are_left_out_if_asked_for(tiles, tmp_path):
    folder, block = table_block(tiles, tmp_path)
    (folder / "images/tile_0000_0000.tif").write_bytes(b"")
    with pytest.raises(UserError, match="tile_0000_0000.tif cannot be read"):
        prepared(block, tmp_path)
    stream = prepared(
        tile_block(tiles, task="classification", chip=0, block=128, options=block.options | {"skip_bad": True}),
        tmp_path,
    )
    assert len(stream.sample) == 47
    assert "left out: " in stream.notes[0]
    masks = tmp_path / "masked"
    shutil.copytree(tiles, masks)
    for path in [*(masks / "images").iterdir()][:2]:
        path.write_bytes(b"")
    for path in [*(masks / "masks").iterdir()][-3:]:
        path.write_bytes(path.read_bytes()[:600])
    stream = prepared(tile_block(masks, options={"skip_bad": True}), tmp_path)
    assert len([note for note in stream.notes if note.startswith("left out: ")]) == 5
    for path in (masks / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        prepared(tile_block(masks, options={"skip_bad": True}), tmp_path)


def test_of_a_scene_in_a_file_a_band_the_damaged_one_is_named(raw_folder, tmp_path):
    folder = tmp_path / "scene"
    shutil.copytree(raw_folder("osm_landuse"), folder)
    (path,) = folder.glob("*_B11.jp2")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="_B11.jp2 cannot be read: "):
        prepared(scene_block(raw_folder, options={"folder": str(folder)}), tmp_path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="_B11.jp2 cannot be read: "):
        prepared(scene_block(raw_folder, options={"folder": str(folder)}), tmp_path)


def windows(raw, folder, starts):
    """Two rows of windows of 128 px of the scene that begin at these columns, and their masks."""
    scene, transform, crs = osm_landuse.read_scene(raw("osm_landuse"))
    mask = osm_landuse.read_mask(raw("osm_landuse"), transform, scene.shape[1:])
    for kind, values in (("images", scene[1:4]), ("masks", mask[None])):
        (folder / kind).mkdir(parents=True)
        for row in (256, 384):
            for column in starts:
                place = rasterio.windows.transform(Window(column, row, 128, 128), transform)
                with rasterio.open(
                    folder / kind / f"t{row:03d}_{column:04d}.tif", "w", driver="GTiff", height=128, width=128,
                    count=len(values), dtype=values.dtype, crs=crs, transform=place,
                ) as file:  # fmt: skip
                    file.write(values[:, row : row + 128, column : column + 128])
    return folder


def test_no_split_sees_anothers_ground_where_images_overlap(raw_folder, tmp_path):
    starts = [first + more for first in range(0, 1400, 320) for more in (0, 100)]
    folder = windows(raw_folder, tmp_path / "pairs", starts)
    for seed in range(3):
        stream = prepared(tile_block(folder, chip=128, block=128, seed=seed), tmp_path)
        splits = {name[:9]: split for name, split in zip(stream.sample, stream.split, strict=True)}
        pairs = [(f"t{row}_{first:04d}", f"t{row}_{first + 100:04d}") for row in (256, 384) for first in starts[::2]]
        pairs = [pair for pair in pairs if set(pair) <= set(splits)]
        assert len(pairs) > 6
        assert all(splits[one] == splits[other] for one, other in pairs)
        assert not any("share ground" in note for note in stream.notes)
    dense = windows(raw_folder, tmp_path / "dense", range(0, 1400, 96))
    with pytest.raises(UserError, match="hangs together in [12] of the 3 pieces.*split: random"):
        prepared(tile_block(dense, chip=128, block=128), tmp_path)
    loose = prepared(tile_block(dense, chip=128, block=0, options={"split": "random"}), tmp_path)
    assert any("chips share ground with one of another split, such as t" in note for note in loose.notes)


def test_a_split_without_a_class_is_said(tiles, tmp_path):
    splits = (["train"] * 4 + ["val", "test"]) * 8
    kinds = ["water" if number < 4 else ("farm", "forest")[number % 2] for number in range(48)]
    _, options = labelled(tiles, tmp_path, split=splits, label=kinds)
    block = tile_block(
        tiles, task="classification", chip=0, block=0, splits=None, options=options | {"split": "column"}
    )
    notes = prepared(block, tmp_path).notes
    assert notes == ["the split val has nothing of forest, water", "the split test has nothing of farm, water"]


REFUSED = {
    "units": ({"options": {"units": "dm"}}, "units 'dm' are not known"),
    "an unknown option": ({"options": {"bandz": 1}}, "unknown key: bandz"),
    "no such images": (
        {"options": {"images": "images/*.tiff"}},
        r"has no file like images/\*.tiff. It has: images, masks",
    ),
    "bands": ({"options": {"bands": BANDS}}, "has 3 bands, and 13 are described"),
    "no classes": ({"options": {"classes": []}}, "list the classes"),
    "values": ({"options": {"classes": ["farm"]}}, "has the value [1-6]; the classes are 0 to 0, and 255 is ignored"),
    "no chip": ({"chip": 0}, "lacks: chip"),
    "no block": ({"block": 0}, "lacks: block"),
    "no splits": ({"splits": None}, "lacks: splits"),
    "none of the three": ({"splits": None, "block": 0, "chip": 0}, "lacks: splits.*; block.*; chip"),
    "too large chips": ({"chip": 256}, "No image has 256 px on both sides"),
    "too few blocks": ({"block": 1024}, "cannot fill three splits"),
    "time": ({"options": {"time": "16.2.2017"}}, "time is '16.2.2017'"),
    "a split rule": ({"options": {"split": "chips"}}, "it must be blocks, random or column"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(tiles, tmp_path, what):
    changes, words = REFUSED[what]
    block = tile_block(tiles, **changes)
    with pytest.raises(UserError, match=words):
        prepared(block, tmp_path)


def test_a_table_that_does_not_fit_is_refused(tiles, tmp_path):
    folder, options = labelled(tiles, tmp_path)
    block = tile_block(tiles, task="classification", chip=0, block=128, options=options)
    table = pd.read_csv(folder / "labels.csv")
    for change, words in (
        ({"file": ["no.tif", *table.file[1:]]}, "lists 'no.tif', and there is no such image"),
        ({"file": [table.file[1], *table.file[1:]]}, "lists tile_0000_0128.tif twice"),
        ({"label": ["", *table.label[1:]]}, "tile_0000_0000.tif has no label"),
    ):
        table.assign(**change).to_csv(folder / "labels.csv", index=False)
        with pytest.raises(UserError, match=words):
            prepared(block, tmp_path)
    table.drop(columns="label").to_csv(folder / "labels.csv", index=False)
    with pytest.raises(UserError, match="has no column 'label'. It has: file"):
        prepared(block, tmp_path)
    with rasterio.open(folder / "images/tile_0000_0000.tif") as file:
        small = file.read(window=Window(0, 0, 100, 100))
        profile = {**file.profile, "height": 100, "width": 100}
    with rasterio.open(folder / "images/tile_0000_0000.tif", "w", **profile) as file:
        file.write(small)
    table.to_csv(folder / "labels.csv", index=False)
    with pytest.raises(UserError, match="Images differ in size: .* has 100 x 100 px.* Give a chip"):
        prepared(block, tmp_path)
    assert prepared(dataclasses.replace(block, chip=64), tmp_path).shape == (3, 64, 64)


def test_a_damaged_image_is_named_or_left_out(tiles, tmp_path):
    folder, options = labelled(tiles, tmp_path)
    stream = prepared(tile_block(tiles, task="classification", chip=0, block=128, options=options), tmp_path)
    path = folder / "images/tile_0000_0128.tif"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="tile_0000_0128.tif cannot be read"):
        image_writer.write(stream, tmp_path / "scratch", tmp_path / "store", workers=1)
    written = image_writer.write(stream, tmp_path / "scratch", tmp_path / "store", workers=1, skip_bad=True)
    assert list(written.skipped) == ["images/tile_0000_0128"]


def test_rows_without_an_image_are_left_out_if_asked_for(tiles, tmp_path):
    folder, block = table_block(tiles, tmp_path)
    (folder / "images/tile_0000_0128.tif").unlink()
    with pytest.raises(UserError, match="lists 'tile_0000_0128.tif', and there is no such image"):
        prepared(block, tmp_path)
    asked = dataclasses.replace(block, options=block.options | {"skip_bad": True})
    stream = prepared(asked, tmp_path)
    assert len(stream.sample) == 47
    assert any("lists tile_0000_0128.tif, and there is no such" in note for note in stream.notes)
    for path in (folder / "images").iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    with pytest.raises(UserError, match="there is no such image"):
        prepared(asked, tmp_path)


def test_names_are_found_however_their_accents_are_written(tiles, tmp_path):
    folder, block = table_block(tiles, tmp_path)
    apart, whole = (unicodedata.normalize(form, "m\u00fchle.tif") for form in ("NFD", "NFC"))
    (folder / "images/tile_0000_0128.tif").rename(folder / "images" / apart)
    table = folder / "labels.csv"
    table.write_text(table.read_text().replace("tile_0000_0128.tif", whole))
    assert len(prepared(block, tmp_path).sample) == 48


def test_labels_that_differ_in_capitals_are_refused(tiles, tmp_path):
    folder, block = table_block(tiles, tmp_path)
    table = folder / "labels.csv"
    table.write_text(table.read_text().replace("forest", "Forest", 1))
    with pytest.raises(UserError, match="'Forest' and 'forest', which differ in capitals alone"):
        prepared(block, tmp_path)
    listed = dataclasses.replace(block, options=block.options | {"classes": ["Forest", "farm", "forest"]})
    assert prepared(listed, tmp_path).classes == ("Forest", "farm", "forest")
