"""Labels as polygons over a scene."""

import geopandas
import numpy as np
import pandas as pd
import pytest
import shapely
from rasterio.windows import Window

from pipeline.data.sources import custom
from pipeline.data.sources.custom.labels import read_polygons
from pipeline.data.sources.custom.rasters import open_image
from pipeline.errors import UserError
from pipeline.tasks import IGNORE
from tests.errors import raises
from tests.pipeline.data.sources.custom import custom_data
from tests.pipeline.data.sources.custom.custom_data import BLUE, BLUE_GREEN_RED, GRID, UTM, prepare, scene_dataset

WEST, NORTH = GRID.c, GRID.f
# Three columns of 20 px, and a smaller polygon in the first; the last four columns have no label.
POLYGONS = geopandas.GeoDataFrame(
    {"fclass": ["farm", "forest", "water", "meadow"]},
    geometry=[
        *(shapely.box(WEST + 200 * n, NORTH - 640, WEST + 200 * (n + 1), NORTH) for n in range(3)),
        shapely.box(WEST, NORTH - 100, WEST + 100, NORTH),
    ],
    crs=UTM,
)
EXPECTED = np.full((64, 64), IGNORE)
EXPECTED[:, :20], EXPECTED[:, 20:40], EXPECTED[:, 40:60], EXPECTED[:10, :10] = 0, 1, 3, 2


@pytest.fixture
def read(tmp_path):
    """Function from changed polygons, written to a file, to the mask, the classes and the notes."""
    custom_data.write_raster(tmp_path / "scene.tif", custom_data.counting_values(64, 64), GRID)

    def read(polygons=POLYGONS, name="land.geojson", **options):
        path, notes = tmp_path / name, []
        if not path.exists():
            polygons.to_parquet(path) if name.endswith("parquet") else polygons.to_file(path)
        image = open_image([tmp_path / "scene.tif"], [BLUE])
        options = {"classes": [], "label_column": "fclass"} | options
        read_mask, classes = read_polygons(path, image, custom_data.make_options(tmp_path, **options), notes)
        return read_mask(image, Window(0, 0, 64, 64)), classes, notes

    return read


SWAPPED = shapely.transform(POLYGONS.to_crs(4326).geometry, lambda points: points[:, ::-1])


@pytest.mark.parametrize(
    ("polygons", "fields"),
    [
        (POLYGONS.set_geometry(POLYGONS.translate(10000)), {"key": "labels"}),
        (POLYGONS.to_crs(4326).set_geometry(SWAPPED), {"key": "labels"}),
        (POLYGONS.set_geometry(POLYGONS.representative_point()), {"key": "labels"}),
        (POLYGONS.rename(columns={"fclass": "kind"}), {"key": "label_column", "allowed": ["kind", "geometry"]}),
        (pd.concat([POLYGONS] * 64, ignore_index=True).assign(fclass=range(256)), {"key": "label_column"}),
    ],
)
def test_read_polygons_invalid_polygons_are_refused(read, tmp_path, polygons, fields):
    with raises(UserError, path=tmp_path / "land.geojson", **fields):
        read(polygons)


def test_read_polygons_smaller_polygon_counts_and_listed_classes_are_in_their_order(read):
    mask, classes, notes = read()
    assert classes == ("farm", "forest", "meadow", "water")
    np.testing.assert_array_equal(mask, EXPECTED)
    assert len(notes) == 1
    mask, classes, notes = read(classes=["water", "farm"])
    assert classes == ("water", "farm")
    np.testing.assert_array_equal(np.unique(mask), [0, 1, IGNORE])
    assert "forest, meadow" in notes[0]
    with raises(UserError, key="classes", value=["glacier"]):
        read(classes=["farm", "glacier"])


def test_read_polygons_classes_may_be_numbers_and_absent(read):
    numbers = POLYGONS.assign(fclass=[1, 2, None, 4])
    mask, classes, notes = read(numbers)
    assert classes == ("1", "2", "4")
    assert (mask[:, 40:] == IGNORE).all()
    assert any("1 of 4 polygons have no class" in note for note in notes)


def test_read_polygons_classes_that_differ_in_capitals_are_refused_unless_listed(read, tmp_path):
    polygons = POLYGONS.assign(fclass=["farm", "Farm", "water", "meadow"])
    with raises(UserError, "Farm", "farm", tmp_path / "land.geojson", key="classes"):
        read(polygons)
    assert any("polygons of Farm, " in note for note in read(polygons, classes=["farm", "water"])[2])


def test_read_polygons_with_two_classes_and_other_geometries_are_noted(read):
    repeated = POLYGONS[:2].assign(fclass="water")
    points = POLYGONS[:1].set_geometry(POLYGONS[:1].representative_point())
    notes = read(pd.concat([POLYGONS, repeated, POLYGONS[:1], points], ignore_index=True))[2]
    assert any(note.startswith("2 polygons occur again") for note in notes)
    assert any(note.startswith("1 of 8 features are not polygons") for note in notes)


def test_read_polygons_layer_of_a_file_with_several_is_named(read, tmp_path):
    for layer, polygons in (("draft", POLYGONS[:2]), ("final", POLYGONS)):
        polygons.to_file(tmp_path / "two.gpkg", layer=layer)
    for layer in ("", "last"):
        with raises(UserError, key="layer", value=layer, allowed=["draft", "final"], path=tmp_path / "two.gpkg"):
            read(name="two.gpkg", layer=layer)
    np.testing.assert_array_equal(read(name="two.gpkg", layer="final")[0], EXPECTED)


@pytest.mark.parametrize(
    ("name", "file"),
    [("land.shp", "land.dbf"), ("land.parquet", "land.parquet"), ("land.gdb", "land.gdb/land.dbf")],
)
def test_fetch_and_prepare_polygons_of_other_formats_use_every_file(read, raw_folder, tmp_path, params, name, file):
    np.testing.assert_array_equal(read(name=name)[0], EXPECTED)
    pattern = "land.*" if name.endswith(".shp") else name
    options = {"folder": str(tmp_path), "images": "scene.tif", "labels": pattern, "bands": BLUE_GREEN_RED[:1]}
    dataset = scene_dataset(raw_folder, chip=16, block=16, options=options)
    assert prepare(dataset, tmp_path).classes == ("farm", "forest", "meadow", "water")
    before = custom.fetch(dataset, params)["content_sha256"]
    path = tmp_path / file
    path.write_bytes(path.read_bytes() + b" ")
    assert custom.fetch(dataset, params)["content_sha256"] != before


def test_prepare_several_files_of_polygons_are_refused(read, raw_folder, tmp_path):
    for name in ("land.geojson", "more.geojson"):
        read(name=name)
    options = {"folder": str(tmp_path), "images": "scene.tif", "labels": "*.geojson", "bands": BLUE_GREEN_RED[:1]}
    with raises(UserError, key="labels", value="*.geojson", allowed=["land.geojson", "more.geojson"]):
        prepare(scene_dataset(raw_folder, options=options), tmp_path)
