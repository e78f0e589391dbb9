"""Scenes, polygons and ground that once gave wrong results without a word: each is right, refused or said."""

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from rasterio import Affine

from pipeline.data import image_store, image_writer
from pipeline.data.sources import custom
from pipeline.errors import UserError
from tests.pipeline.data.sources.custom.test_custom import THREE, prepared, scene_block, tile_block
from tests.pipeline.data.sources.custom.test_labels import rewrite, vector

UTM = "EPSG:32633"


def written(path, values, transform, crs=UTM, **profile):
    path.parent.mkdir(parents=True, exist_ok=True)
    given = {"driver": "GTiff", "count": len(values), "height": values.shape[1], "width": values.shape[2]}
    with rasterio.open(
        path, "w", dtype=values.dtype, transform=transform, **given, **({"crs": crs} if crs else {}), **profile
    ) as file:
        file.write(values)


def scene_of(folder, bands, **options):
    """A block of a scene in files a band, with two polygons that share it."""
    with rasterio.open(next(folder.glob("*B02.tif"))) as file:
        west, south, east, north = file.bounds
        crs = file.crs
    middle = (west + east) / 2
    shapes = [shapely.box(west, south, middle, north), shapely.box(middle, south, east, north)]
    geopandas.GeoDataFrame({"fclass": ["a", "b"]}, geometry=shapes, crs=crs).to_file(folder / "land.geojson")
    return {"folder": str(folder), "images": "*.tif", "labels": "land.geojson", "units": "dn", "time": ""} | {
        "bands": [{"name": name, "common_name": name.lower()} for name in bands], **options
    }  # fmt: skip


GRID = Affine(10, 0, 400000, 0, -10, 5800000)


def counted(height, width, base=0):
    return (np.arange(height * width, dtype="uint16").reshape(1, height, width) % 1000) + base


def test_more_classes_than_a_mask_holds_are_refused(raw_folder, tmp_path):
    options = vector(raw_folder, tmp_path, lambda frame: frame.assign(fclass=range(len(frame))))
    with pytest.raises(UserError, match="classes in 'fclass', such as 0; masks hold 255 at most"):
        prepared(scene_block(raw_folder, options=options), tmp_path)


def test_of_several_layers_one_is_named(raw_folder, tmp_path):
    options = vector(raw_folder, tmp_path, lambda frame: frame)
    frame = geopandas.read_file(tmp_path / "land.geojson")
    swapped = frame.assign(fclass=frame.fclass.replace({"farm": "forest", "forest": "farm"}))
    for layer, which in (("draft", swapped), ("final", frame)):
        which.to_file(tmp_path / "two.gpkg", layer=layer)
    options |= {"classes": ["farm", "forest"]}
    with pytest.raises(UserError, match=r"two.gpkg has the layers draft, final. Name one as layer"):
        prepared(scene_block(raw_folder, options=options | {"labels": "two.gpkg"}), tmp_path)
    with pytest.raises(UserError, match="has no layer 'last'. It has: draft, final"):
        prepared(scene_block(raw_folder, options=options | {"labels": "two.gpkg", "layer": "last"}), tmp_path)
    one = prepared(scene_block(raw_folder, options=options), tmp_path)
    found = prepared(scene_block(raw_folder, options=options | {"labels": "two.gpkg", "layer": "final"}), tmp_path)
    name = one.sample[0]
    np.testing.assert_array_equal(found.read_sample(name).label, one.read_sample(name).label)


@pytest.mark.parametrize("name", ["land.shp", "land.parquet", "land.gdb"])
def test_polygons_of_other_formats_are_the_same_and_every_file_of_them_counts(raw_folder, tmp_path, params, name):
    options = vector(raw_folder, tmp_path, lambda frame: frame)
    frame = geopandas.read_file(tmp_path / "land.geojson")
    if name.endswith(".parquet"):
        frame.to_parquet(tmp_path / name)
    elif name.endswith(".gdb"):
        frame.to_file(tmp_path / name, driver="OpenFileGDB")
    else:
        frame.to_file(tmp_path / name)
    known = prepared(scene_block(raw_folder, options=options), tmp_path)
    options |= {"labels": "land.*" if name.endswith(".shp") else name}
    if name.endswith(".shp"):
        (tmp_path / "land.geojson").unlink()
    block = scene_block(raw_folder, options=options)
    found = prepared(block, tmp_path)
    assert found.classes == known.classes
    np.testing.assert_array_equal(found.read_sample(found.sample[0]).label, known.read_sample(known.sample[0]).label)
    before = custom.fetch(block, params)["content_sha256"]
    inner = tmp_path / "land.dbf" if name.endswith(".shp") else tmp_path / name
    inner = next(one for one in sorted(inner.iterdir()) if one.is_file()) if inner.is_dir() else inner
    inner.write_bytes(inner.read_bytes() + b" ")
    assert custom.fetch(block, params)["content_sha256"] != before


def test_what_is_no_polygon_is_said(raw_folder, tmp_path):
    def change(frame):
        water = frame[frame.fclass == "water"]
        return frame.assign(geometry=frame.geometry.where(frame.fclass != "water", water.representative_point()))

    said = prepared(scene_block(raw_folder, options=vector(raw_folder, tmp_path, change)), tmp_path).notes
    assert any("features are no polygons, and are not used" in note for note in said)


def test_a_band_that_ends_short_of_the_scene_has_no_data_there(raw_folder, tmp_path):
    for name, base in (("B02", 0), ("B03", 1000)):
        written(tmp_path / f"s_{name}.tif", counted(384, 384, base), GRID)
    written(tmp_path / "s_B01.tif", counted(64, 63, 5000), GRID * Affine.scale(6))
    options = scene_of(tmp_path, ["B02", "B03", "B01"])
    stream = prepared(scene_block(raw_folder, chip=64, block=64, options=options), tmp_path)
    sample = stream.read_sample("r00000c00320")
    assert (sample.label[:, 58:] == image_store.IGNORE).all()
    assert (sample.label[:, :58] != image_store.IGNORE).all()
    assert sample.image[2].min() >= 5000
    assert any("where some band has no data" in note for note in stream.notes)


def test_the_finest_grid_is_told_by_metres(raw_folder, tmp_path):
    for name in ("B02", "B03"):
        written(tmp_path / f"s_{name}.tif", counted(256, 256), GRID)
    west, north = rasterio.warp.transform(UTM, "EPSG:4326", [399000], [5801000])
    degrees = Affine(0.000278, 0, west[0], 0, -0.000278, north[0])
    written(tmp_path / "s_DEM.tif", np.ones((1, 300, 300), "uint16"), degrees, "EPSG:4326")
    options = scene_of(tmp_path, ["B02", "B03", "DEM"])
    stream = prepared(scene_block(raw_folder, chip=64, block=64, options=options), tmp_path)
    assert len(stream.sample) == 16
    np.testing.assert_array_equal(stream.read_sample("r00064c00000").image[0], counted(256, 256)[0, 64:128, :64])
    assert [note for note in stream.notes if "finest grid" in note] == [
        "s_DEM.tif brought to the finest grid by nearest neighbour"
    ]


def test_a_bands_name_is_whole_and_its_file_its_own(raw_folder, tmp_path):
    for name in ("B02", "B03", "B8A"):
        written(tmp_path / f"s_{name}.tif", counted(128, 128), GRID)
    with pytest.raises(UserError, match="Band B8 should be in the name of one file; it is in 0 of"):
        prepared(scene_block(raw_folder, options=scene_of(tmp_path, ["B02", "B03", "B8"])), tmp_path)
    with pytest.raises(UserError, match="Band s_B02 should be .* it is in 1 of: s_B02.tif.* no other band have that"):
        prepared(scene_block(raw_folder, options=scene_of(tmp_path, ["B02", "s_B02"])), tmp_path)
    written(tmp_path / "s_B04.tif", np.repeat(counted(128, 128), 3, 0), GRID)
    with pytest.raises(UserError, match="s_B04.tif has 3 bands; of a scene in a file a band, each has one"):
        prepared(scene_block(raw_folder, options=scene_of(tmp_path, ["B02", "B03", "B04"])), tmp_path)


def test_a_band_without_a_system_that_lies_elsewhere_is_refused(raw_folder, tmp_path):
    written(tmp_path / "s_B02.tif", counted(128, 128), GRID)
    written(tmp_path / "s_B03.tif", counted(128, 128), Affine(10, 0, 0, 0, -10, 0), crs=None)
    with pytest.raises(UserError, match="s_B03.tif does not show the ground that .*s_B02.tif shows"):
        prepared(scene_block(raw_folder, options=scene_of(tmp_path, ["B02", "B03"])), tmp_path)


def pairs_at(folder, transforms, crs):
    """Image and mask pairs of 64 px, each at a place."""
    for number, transform in enumerate(transforms):
        values = counted(64, 64, number)
        written(folder / f"images/t{number:02d}.tif", values, transform, crs)
        written(folder / f"masks/t{number:02d}.tif", (values % 4).astype("uint8"), transform, crs)
    return {"folder": str(folder), "bands": THREE[:1]}


@pytest.mark.parametrize("seed", range(3))
def test_splits_know_shared_ground_across_the_antimeridian(tmp_path, seed):
    step = 0.0001
    west = [Affine(step, 0, 179.9966 - 0.01 * n, 0, -step, 10) for n in range(4)]
    east = [Affine(step, 0, -180 + 0.01 * n, 0, -step, 10) for n in range(4)]
    turned = [Affine(step, 0, 180.05, 0, -step, 10), Affine(step, 0, -179.9468, 0, -step, 10)]
    options = pairs_at(tmp_path, [*west, *east, *turned], "EPSG:4326")
    stream = prepared(tile_block(tmp_path, block=64, seed=seed, options=options), tmp_path)
    home = dict(zip(stream.sample, stream.split, strict=True))
    for one, other in ((0, 4), (8, 9)):
        assert home[f"t{one:02d}_r00000c00000"] == home[f"t{other:02d}_r00000c00000"]
    places = {name: stream.read_sample(name) for name in stream.sample}
    assert all(-180 <= one.lon < 180 for one in places.values())
    assert places["t08_r00000c00000"].lon == pytest.approx(180.0532 - 360)
    image_writer.write(stream, tmp_path / "scratch", tmp_path / "store", workers=1)


def test_splits_know_shared_ground_of_images_without_a_system(tmp_path):
    options = pairs_at(tmp_path, [Affine(10, 0, 320 * n, 0, -10, 0) for n in range(8)], None)
    with pytest.raises(UserError, match="hangs together in 1 of the 3 pieces"):
        prepared(tile_block(tmp_path, block=64, options=options), tmp_path)
    stream = prepared(tile_block(tmp_path, block=64, options=options | {"split": "random"}), tmp_path)
    assert any("share ground with one of another split" in note for note in stream.notes)


@pytest.mark.parametrize("angle", [0, 30, 90])
def test_blocks_of_turned_images_have_their_size(tmp_path, angle):
    turn = Affine.translation(400000, 5800000) * Affine.rotation(angle) * Affine.scale(10, -10)
    options = pairs_at(tmp_path, [turn * Affine.translation(64 * n, 0) for n in range(16)], UTM)
    stream = prepared(tile_block(tmp_path, block=128, options=options), tmp_path)
    home = dict(zip(stream.sample, stream.split, strict=True))
    for number in range(0, 16, 2):
        assert home[f"t{number:02d}_r00000c00000"] == home[f"t{number + 1:02d}_r00000c00000"]


def test_images_and_masks_that_count_pixels_from_a_corner_have_no_place(tmp_path):
    options = pairs_at(tmp_path, [Affine(1, 0, 0, 0, -1, 64)] * 8, None)
    assert len(prepared(tile_block(tmp_path, block=64, options=options), tmp_path).sample) == 8
    options = pairs_at(tmp_path / "same", [Affine(10, 0, 500, 0, -10, 900)] * 8, None)
    assert len(prepared(tile_block(tmp_path / "same", block=64, options=options), tmp_path).sample) == 8
    options = pairs_at(tmp_path / "utm", [GRID * Affine.translation(64 * n, 0) for n in range(8)], UTM)
    for path in (tmp_path / "utm/masks").iterdir():
        rewrite(path, crs=None, transform=Affine(1, 0, 0, 0, -1, 64))
    assert len(prepared(tile_block(tmp_path / "utm", block=64, options=options), tmp_path).sample) == 8


def test_bands_names_at_a_words_end_and_with_an_alpha_band(raw_folder, tmp_path):
    for name in ("sceneB02", "sceneB8A"):
        written(tmp_path / f"{name}.tif", counted(128, 128), GRID)
    alpha = np.stack([counted(128, 128)[0], np.full((128, 128), 65535, "uint16")])
    written(tmp_path / "sceneB03.tif", alpha, GRID, photometric="MINISBLACK", alpha="YES")
    options = scene_of(tmp_path, ["B02", "B03", "B8A"])
    stream = prepared(scene_block(raw_folder, chip=32, block=32, options=options), tmp_path)
    np.testing.assert_array_equal(stream.read_sample("r00000c00000").image[1], alpha[0, :32, :32])
    with pytest.raises(UserError, match="Band B8 should be in the name of one file; it is in 0"):
        prepared(scene_block(raw_folder, options=scene_of(tmp_path, ["B02", "B8"])), tmp_path)
