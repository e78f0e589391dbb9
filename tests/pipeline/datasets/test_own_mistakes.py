"""Mistakes that people make with data of their own: each is refused in words, or said in the store's notes."""

import shutil

import geopandas
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from rasterio.windows import Window

from pipeline.datasets import landuse
from pipeline.datasets.own.masks import pair
from pipeline.datasets.own.rasters import contains
from pipeline.errors import UserError
from pipeline.imagery import imagestore
from tests.pipeline.datasets.test_own import THREE, labelled, prepared, scene_block, tile_block, tiles

__all__ = ["tiles"]


def rewrite(path, change=lambda values: values, **profile):
    """A raster again, with other values or another place."""
    with rasterio.open(path) as file:
        values, old = change(file.read()), file.profile
    path.unlink()
    with rasterio.open(path, "w", **{**old, "dtype": values.dtype, "count": len(values), **profile}) as file:
        file.write(values)


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
        imagestore.write(stream, tmp_path / "scratch", tmp_path / "store", workers=1)
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


def test_of_a_scene_in_a_file_a_band_the_damaged_one_is_named(raw, tmp_path):
    folder = tmp_path / "scene"
    shutil.copytree(raw("landuse"), folder)
    stream = prepared(scene_block(raw, options={"folder": str(folder)}), tmp_path)
    (path,) = folder.glob("*_B11.jp2")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="_B11.jp2 cannot be read: "):
        stream.read(stream.sample[0])
    path.write_bytes(b"")
    with pytest.raises(UserError, match="_B11.jp2 cannot be read: "):
        prepared(scene_block(raw, options={"folder": str(folder)}), tmp_path)


def half(mask):
    return np.where(mask == 255, 255, 0.5).astype("float32")


def not_a_number(mask):
    return np.where(mask == 255, np.nan, mask).astype("float32")


MASKS = {
    "halves": (lambda path: rewrite(path, half), "has the value 0.5; the classes are"),
    "not numbers": (lambda path: rewrite(path, not_a_number), "has the value nan; the classes are"),
    "a picture": (lambda path: rewrite(path, lambda mask: np.repeat(mask, 3, 0)), "has 3 bands; a mask has one"),
    "another place": (
        lambda path: rewrite(path, transform=rasterio.Affine(10, 0, 400000, 0, -10, 5800000)),
        "does not lie on the ground where its image",
    ),
    "another system": (lambda path: rewrite(path, crs="EPSG:32632"), "does not lie on the ground where its image"),
    "torn": (lambda path: path.write_bytes(path.read_bytes()[:600]), "mask.tif cannot be read: .* Is the file whole"),
}


@pytest.mark.parametrize("what", MASKS)
def test_masks_that_do_not_fit(tiles, tmp_path, what):
    change, words = MASKS[what]
    folder = tmp_path / "tiles"
    shutil.copytree(tiles, folder)
    for path in (folder / "masks").iterdir():
        change(path)
    with pytest.raises(UserError, match=words):
        prepared(tile_block(folder), tmp_path)


def test_masks_are_found_by_whole_names(tmp_path):
    images = [tmp_path / f"images/tile_{number}.tif" for number in range(12)]
    masks = [tmp_path / f"masks/tile_{number}_mask.tif" for number in range(12)]
    found = pair(images, masks)
    assert [found[str(image)] for image in images] == list(map(str, masks))
    with pytest.raises(UserError, match="tile_1.tif has 0 masks"):
        pair(images, masks[:1] + masks[2:])
    with pytest.raises(UserError, match="tile_a.tif is the mask of both .*tile.tif and .*tile_a.tif"):
        pair([tmp_path / "tile.tif", tmp_path / "tile_a.tif"], [tmp_path / "m/tile_a.tif"])
    assert contains("LC08_B1", "B1")
    assert not contains("LC08_B10", "B1")


def test_folders_may_repeat_names(tiles, tmp_path):
    folder = tmp_path / "tiles"
    paths = {kind: sorted((tiles / kind).iterdir()) for kind in ("images", "masks")}
    for kind, all_paths in paths.items():
        for number, path in enumerate(all_paths):
            target = folder / kind / "ab"[number % 2] / f"t{number // 2:02d}.tif"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    block = {"images": "images/**/*.tif", "labels": "masks/**/*.tif"}
    stream, theirs = prepared(tile_block(folder, options=block), tmp_path), prepared(tile_block(tiles), tmp_path)
    assert len(stream.sample) == len(theirs.sample) > 100
    name = next(name for name in stream.sample if name.startswith("images/b/t03") and name.endswith("r00000c00000"))
    with rasterio.open(paths["masks"][7]) as file:
        np.testing.assert_array_equal(stream.read(name).label, file.read(1)[:64, :64])
    shutil.copytree(folder / "masks/a", folder / "masks/c/a")
    with pytest.raises(UserError, match="has 2 masks"):
        prepared(tile_block(folder, options=block), tmp_path)


def windows(raw, folder, starts):
    """Two rows of windows of 128 px of the scene that begin at these columns, and their masks."""
    scene, transform, crs = landuse.read_scene(raw("landuse"))
    mask = landuse.read_mask(raw("landuse"), transform, scene.shape[1:])
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


def test_no_split_sees_anothers_ground_where_images_overlap(raw, tmp_path):
    starts = [first + more for first in range(0, 1400, 320) for more in (0, 100)]
    folder = windows(raw, tmp_path / "pairs", starts)
    for seed in range(3):
        stream = prepared(tile_block(folder, chip=128, block=128, seed=seed), tmp_path)
        splits = {name[:9]: split for name, split in zip(stream.sample, stream.split, strict=True)}
        pairs = [(f"t{row}_{first:04d}", f"t{row}_{first + 100:04d}") for row in (256, 384) for first in starts[::2]]
        pairs = [pair for pair in pairs if set(pair) <= set(splits)]
        assert len(pairs) > 6
        assert all(splits[one] == splits[other] for one, other in pairs)
        assert not any("share ground" in note for note in stream.notes)
    dense = windows(raw, tmp_path / "dense", range(0, 1400, 96))
    with pytest.raises(UserError, match="hangs together in [12] of the 3 pieces.*split: random"):
        prepared(tile_block(dense, chip=128, block=128), tmp_path)
    loose = prepared(tile_block(dense, chip=128, block=0, options={"split": "random"}), tmp_path)
    assert any("chips share ground with one of another split, such as t" in note for note in loose.notes)


def vector(raw, folder, change, name="land.geojson"):
    """The scene's polygons, changed, in a file."""
    frame = geopandas.read_file(next(raw("landuse").glob("*.gpkg")))[["fclass", "geometry"]].to_crs(4326)
    change(frame).to_file(folder / name)
    shutil.copy(next(raw("landuse").glob("*_B02.jp2")), folder / "scene.jp2")
    return {"folder": str(folder), "images": "scene.jp2", "labels": name, "bands": THREE[:1]}


POLYGONS = {
    "elsewhere": (lambda frame: frame.set_geometry(frame.translate(10)), "does not meet .*scene.jp2: .*swapped"),
    "swapped": (
        lambda frame: frame.set_geometry(shapely.transform(frame.geometry, lambda points: points[:, ::-1])),
        "does not meet .*scene.jp2: .*swapped",
    ),
    "points": (lambda frame: frame.set_geometry(frame.representative_point()), "has no polygons"),
    "another column": (lambda frame: frame.rename(columns={"fclass": "kind"}), "no column 'fclass'.*label_column"),
}


@pytest.mark.parametrize("what", POLYGONS)
def test_polygons_that_are_of_no_use(raw, tmp_path, what):
    change, words = POLYGONS[what]
    with pytest.raises(UserError, match=words):
        prepared(scene_block(raw, options=vector(raw, tmp_path, change)), tmp_path)


def test_classes_of_polygons_may_be_numbers(raw, tmp_path):
    codes = {"farm": 1, "forest": 2, "meadow": 3, "water": 4}
    options = vector(raw, tmp_path, lambda frame: frame.assign(fclass=frame.fclass.map(codes)))
    stream = prepared(scene_block(raw, options=options | {"classes": ["1", "2"]}), tmp_path)
    named = prepared(
        scene_block(raw, options={"classes": ["farm", "forest"], "images": "*_B02.jp2", "bands": THREE[:1]}), tmp_path
    )
    assert len(stream.sample) == len(named.sample) > 30
    labels = [(stream.read(name).label == named.read(name).label).mean() for name in stream.sample[:10]]
    assert min(labels) > 0.99
    assert any("polygons have no class" in note for note in stream.notes)


def test_several_files_of_labels_are_refused(raw, tmp_path):
    options = vector(raw, tmp_path, lambda frame: frame)
    shutil.copy(tmp_path / "land.geojson", tmp_path / "more.geojson")
    with pytest.raises(UserError, match="labels fits 2 files, land.geojson, more.geojson"):
        prepared(scene_block(raw, options=options | {"labels": "*.geojson"}), tmp_path)


def test_a_split_without_a_class_is_said(tiles, tmp_path):
    splits = (["train"] * 4 + ["val", "test"]) * 8
    kinds = ["water" if number < 4 else ("farm", "forest")[number % 2] for number in range(48)]
    _, options = labelled(tiles, tmp_path, split=splits, label=kinds)
    block = tile_block(
        tiles, task="classification", chip=0, block=0, splits=None, options=options | {"split": "column"}
    )
    notes = prepared(block, tmp_path).notes
    assert notes == ["the split val has nothing of forest, water", "the split test has nothing of farm, water"]
