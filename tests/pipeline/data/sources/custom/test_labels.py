"""Mistakes in masks and polygons of one's own: each is refused in words, or said in the store's notes."""

import shutil

import geopandas
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely

from pipeline.data.sources.custom.mask_labels import pair_masks
from pipeline.data.sources.custom.scenes import has_token
from pipeline.errors import UserError
from tests.pipeline.data.sources.custom.test_custom import THREE, prepared, scene_block, tile_block, tiles

__all__ = ["tiles"]


def rewrite(path, change=lambda values: values, **profile):
    """A raster again, with other values or another place."""
    with rasterio.open(path) as file:
        values, old = change(file.read()), file.profile
    path.unlink()
    with rasterio.open(path, "w", **{**old, "dtype": values.dtype, "count": len(values), **profile}) as file:
        file.write(values)


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
    "another place, and no system": (
        lambda path: rewrite(path, transform=rasterio.Affine(10, 0, 400000, 0, -10, 5800000), crs=None),
        "does not lie on the ground where its image",
    ),
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
    found = pair_masks(images, masks, False, [])
    assert [found[str(image)] for image in images] == list(map(str, masks))
    with pytest.raises(UserError, match="tile_1.tif has 0 masks"):
        pair_masks(images, masks[:1] + masks[2:], False, [])
    with pytest.raises(UserError, match="tile_a.tif is the mask of both .*tile.tif and .*tile_a.tif"):
        pair_masks([tmp_path / "tile.tif", tmp_path / "tile_a.tif"], [tmp_path / "m/tile_a.tif"], False, [])
    assert has_token("LC08_B1", "B1")
    assert not has_token("LC08_B10", "B1")


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
        np.testing.assert_array_equal(stream.read_sample(name).label, file.read(1)[:64, :64])
    shutil.copytree(folder / "masks/a", folder / "masks/c/a")
    with pytest.raises(UserError, match="has 2 masks"):
        prepared(tile_block(folder, options=block), tmp_path)


def vector(raw, folder, change, name="land.geojson"):
    """The scene's polygons, changed, in a file."""
    frame = geopandas.read_file(next(raw("osm_landuse").glob("*.gpkg")))[["fclass", "geometry"]].to_crs(4326)
    change(frame).to_file(folder / name)
    shutil.copy(next(raw("osm_landuse").glob("*_B02.jp2")), folder / "scene.jp2")
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
def test_polygons_that_are_of_no_use(raw_folder, tmp_path, what):
    change, words = POLYGONS[what]
    with pytest.raises(UserError, match=words):
        prepared(scene_block(raw_folder, options=vector(raw_folder, tmp_path, change)), tmp_path)


def test_classes_of_polygons_may_be_numbers(raw_folder, tmp_path):
    codes = {"farm": 1, "forest": 2, "meadow": 3, "water": 4}
    options = vector(raw_folder, tmp_path, lambda frame: frame.assign(fclass=frame.fclass.map(codes)))
    stream = prepared(scene_block(raw_folder, options=options | {"classes": ["1", "2"]}), tmp_path)
    named = prepared(
        scene_block(raw_folder, options={"classes": ["farm", "forest"], "images": "*_B02.jp2", "bands": THREE[:1]}), tmp_path
    )
    assert len(stream.sample) == len(named.sample) > 30
    labels = [(stream.read_sample(name).label == named.read_sample(name).label).mean() for name in stream.sample[:10]]
    assert min(labels) > 0.99
    assert any("polygons have no class" in note for note in stream.notes)


def test_several_files_of_labels_are_refused(raw_folder, tmp_path):
    options = vector(raw_folder, tmp_path, lambda frame: frame)
    shutil.copy(tmp_path / "land.geojson", tmp_path / "more.geojson")
    with pytest.raises(UserError, match="labels fits 2 files, land.geojson, more.geojson"):
        prepared(scene_block(raw_folder, options=options | {"labels": "*.geojson"}), tmp_path)


def test_polygons_that_do_not_fit_are_refused(raw_folder, tmp_path):
    for options, words in (
        ({"label_column": "klass"}, "has no column 'klass'. It has: "),
        ({"classes": ["farm", "glacier"]}, "has no polygon of glacier. Its 'fclass' has: farm, forest"),
        ({"images": "*_B0[2-4].jp2"}, "Band B01 should be in the name of one file; it is in 0 of"),
    ):
        with pytest.raises(UserError, match=words):
            prepared(scene_block(raw_folder, options=options), tmp_path)
    chosen = prepared(scene_block(raw_folder, options={"classes": ["water", "farm"]}), tmp_path)
    assert chosen.classes == ("water", "farm")
    assert chosen.notes[0].startswith("polygons of forest, grass, meadow")


def test_images_without_a_mask_are_left_out_if_asked_for(tiles, tmp_path):
    folder = tmp_path / "tiles"
    shutil.copytree(tiles, folder)
    (folder / "masks/tile_0000_0128_mask.tif").unlink()
    with pytest.raises(UserError, match="tile_0000_0128.tif has 0 masks"):
        prepared(tile_block(folder), tmp_path)
    stream = prepared(tile_block(folder, options={"skip_bad": True}), tmp_path)
    assert not any(name.startswith("tile_0000_0128") for name in stream.sample)
    assert any("tile_0000_0128.tif has no mask" in note for note in stream.notes)
    for path in (folder / "masks").iterdir():
        path.rename(path.with_name(f"x{path.name.replace('tile', '')}"))
    with pytest.raises(UserError, match="None of 48 images"):
        prepared(tile_block(folder, options={"skip_bad": True}), tmp_path)


def test_classes_of_polygons_that_differ_in_capitals_are_refused(raw_folder, tmp_path):
    def change(frame):
        frame.loc[frame.index[frame.fclass == "farm"][0], "fclass"] = "Farm"
        return frame

    options = vector(raw_folder, tmp_path, change)
    with pytest.raises(UserError, match="'Farm' and 'farm', which differ in capitals alone"):
        prepared(scene_block(raw_folder, options=options), tmp_path)
    said = prepared(scene_block(raw_folder, options=options | {"classes": ["farm", "forest"]}), tmp_path).notes
    assert any("polygons of Farm, " in note for note in said)


def test_polygons_with_two_classes_are_said(raw_folder, tmp_path):
    def change(frame):
        again = frame[frame.fclass == "farm"][:3].assign(fclass="forest")
        return pd.concat([frame, again, frame[:5]], ignore_index=True)

    options = vector(raw_folder, tmp_path, change)
    # The scene's own have three, of a wetland and what grows there, which do not count where wetland does not.
    for classes, count in (([], 6), (["farm", "forest", "meadow", "water"], 3)):
        said = prepared(scene_block(raw_folder, options=options | {"classes": classes}), tmp_path).notes
        assert f"{count} polygons are there again with another class, and the later counts" in said
