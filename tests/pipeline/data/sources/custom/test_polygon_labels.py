"""Labels as polygons over a scene."""

import shutil

import geopandas
import numpy as np
import pandas as pd
import pytest
import shapely

from pipeline.data.sources import custom
from pipeline.errors import UserError
from tests.errors import raises
from tests.pipeline.data.sources.custom.custom_data import (
    BLUE_GREEN_RED,
    prepare,
    scene_dataset,
    write_polygons,
)


@pytest.fixture
def polygon_dataset(raw_folder, tmp_path):
    """Function from a change to the polygons, and options, to a dataset of one band."""

    def make(change=lambda frame: frame, **options):
        return scene_dataset(raw_folder, options=write_polygons(raw_folder, tmp_path, change) | options)

    return make


def swap_xy(frame):
    return frame.set_geometry(shapely.transform(frame.geometry, lambda points: points[:, ::-1]))


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (lambda frame: frame.set_geometry(frame.translate(10)), {"key": "labels"}),
        (swap_xy, {"key": "labels"}),
        (lambda frame: frame.set_geometry(frame.representative_point()), {"key": "labels"}),
        (
            lambda frame: frame.rename(columns={"fclass": "kind"}),
            {"key": "label_column", "value": "fclass", "allowed": ["kind", "geometry"]},
        ),
        (lambda frame: frame.assign(fclass=range(len(frame))), {"key": "label_column", "value": "fclass"}),
    ],
    ids=["elsewhere", "x and y swapped", "points", "another column", "too many classes"],
)
def test_read_polygons_invalid_polygons_are_refused(polygon_dataset, tmp_path, change, fields):
    with raises(UserError, path=tmp_path / "land.geojson", **fields):
        prepare(polygon_dataset(change), tmp_path)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"label_column": "klass"}, {"key": "label_column", "value": "klass"}),
        ({"classes": ["farm", "glacier"]}, {"key": "classes", "value": ["glacier"]}),
        ({"images": "*_B0[2-4].jp2"}, {"key": "B01", "value": 0}),
    ],
)
def test_prepare_scene_options_that_do_not_fit_are_refused(raw_folder, tmp_path, options, fields):
    with raises(UserError, **fields):
        prepare(scene_dataset(raw_folder, options=options), tmp_path)


def test_read_polygons_listed_classes_are_in_their_order_and_others_noted(raw_folder, tmp_path):
    dataset = prepare(scene_dataset(raw_folder, options={"classes": ["water", "farm"]}), tmp_path)
    assert dataset.classes == ("water", "farm")
    assert "forest, grass, meadow" in dataset.notes[0]


def test_read_polygons_classes_may_be_numbers(raw_folder, polygon_dataset, tmp_path):
    codes = {"farm": 1, "forest": 2, "meadow": 3, "water": 4}

    def number_classes(frame):
        return frame.assign(fclass=frame.fclass.map(codes))

    numbered = prepare(polygon_dataset(number_classes, classes=["1", "2"]), tmp_path)
    options = {"classes": ["farm", "forest"], "images": "*_B02.jp2", "bands": BLUE_GREEN_RED[:1]}
    named = prepare(scene_dataset(raw_folder, options=options), tmp_path)
    assert len(numbered.sample) == len(named.sample) > 30
    equal = [
        (numbered.read_sample(name).label == named.read_sample(name).label).mean() for name in numbered.sample[:10]
    ]
    assert min(equal) > 0.99
    assert any("have no class" in note for note in numbered.notes)


def test_prepare_several_files_of_polygons_are_refused(polygon_dataset, tmp_path):
    dataset = polygon_dataset(labels="*.geojson")
    shutil.copy(tmp_path / "land.geojson", tmp_path / "more.geojson")
    with raises(UserError, key="labels", value="*.geojson", allowed=["land.geojson", "more.geojson"]):
        prepare(dataset, tmp_path)


def test_read_polygons_classes_that_differ_in_capitals_are_refused_unless_listed(polygon_dataset, tmp_path):
    def change(frame):
        frame.loc[frame.index[frame.fclass == "farm"][0], "fclass"] = "Farm"
        return frame

    with raises(UserError, "Farm", "farm", tmp_path / "land.geojson", key="classes"):
        prepare(polygon_dataset(change), tmp_path)
    notes = prepare(polygon_dataset(change, classes=["farm", "forest"]), tmp_path).notes
    assert any("polygons of Farm, " in note for note in notes)


@pytest.mark.parametrize(("classes", "count"), [([], 6), (["farm", "forest", "meadow", "water"], 3)])
def test_read_polygons_with_two_classes_are_noted(polygon_dataset, tmp_path, classes, count):
    """The scene itself has three, of wetland and its vegetation, which count if wetland is listed."""

    def change(frame):
        repeated = frame[frame.fclass == "farm"][:3].assign(fclass="forest")
        return pd.concat([frame, repeated, frame[:5]], ignore_index=True)

    notes = prepare(polygon_dataset(change, classes=classes), tmp_path).notes
    assert [note for note in notes if note.startswith(f"{count} polygons occur again")]


def test_read_polygons_other_geometries_are_noted(polygon_dataset, tmp_path):
    def change(frame):
        water = frame[frame.fclass == "water"]
        return frame.assign(geometry=frame.geometry.where(frame.fclass != "water", water.representative_point()))

    assert any("not polygons" in note for note in prepare(polygon_dataset(change), tmp_path).notes)


def test_read_polygons_layer_of_a_file_with_several_is_named(polygon_dataset, tmp_path):
    options = {"classes": ["farm", "forest"]}
    expected = prepare(polygon_dataset(**options), tmp_path)
    frame = geopandas.read_file(tmp_path / "land.geojson")
    swapped = frame.assign(fclass=frame.fclass.replace({"farm": "forest", "forest": "farm"}))
    for layer, polygons in (("draft", swapped), ("final", frame)):
        polygons.to_file(tmp_path / "two.gpkg", layer=layer)
    options |= {"labels": "two.gpkg"}
    for layer in ("", "last"):
        with raises(UserError, key="layer", value=layer, allowed=["draft", "final"], path=tmp_path / "two.gpkg"):
            prepare(polygon_dataset(**options, layer=layer), tmp_path)
    actual = prepare(polygon_dataset(**options, layer="final"), tmp_path)
    name = expected.sample[0]
    np.testing.assert_array_equal(actual.read_sample(name).label, expected.read_sample(name).label)


@pytest.mark.parametrize("name", ["land.shp", "land.parquet", "land.gdb"])
def test_read_polygons_of_other_formats_are_equal_and_every_file_counts(polygon_dataset, tmp_path, params, name):
    expected, pattern = prepare(polygon_dataset(), tmp_path), name
    frame = geopandas.read_file(tmp_path / "land.geojson")
    if name.endswith(".parquet"):
        frame.to_parquet(tmp_path / name)
    elif name.endswith(".gdb"):
        frame.to_file(tmp_path / name, driver="OpenFileGDB")
    else:
        frame.to_file(tmp_path / name)
        pattern = "land.*"
    dataset = polygon_dataset(labels=pattern)
    if name.endswith(".shp"):
        (tmp_path / "land.geojson").unlink()
    actual = prepare(dataset, tmp_path)
    assert actual.classes == expected.classes
    labels = [prepared.read_sample(prepared.sample[0]).label for prepared in (actual, expected)]
    np.testing.assert_array_equal(*labels)
    before = custom.fetch(dataset, params)["content_sha256"]
    file = tmp_path / "land.dbf" if name.endswith(".shp") else tmp_path / name
    file = next(path for path in sorted(file.iterdir()) if path.is_file()) if file.is_dir() else file
    file.write_bytes(file.read_bytes() + b" ")
    assert custom.fetch(dataset, params)["content_sha256"] != before
