"""Options of custom data, and names of classes."""

import pytest

from pipeline.data.sources.custom.options import normalize_unicode, unique_class_names
from pipeline.errors import UserError
from tests.errors import raises
from tests.pipeline.data.sources.custom.custom_data import BLUE_GREEN_RED, prepare, tile_dataset, write_table

BLUE, *OTHERS = BLUE_GREEN_RED

INVALID_OPTIONS = [
    ("units", "dm", "units", {"value": "dm"}),
    ("bands", [{**BLUE, "wavelength": 492}, *OTHERS], "bands[0].wavelength", {"value": 492}),
    ("bands", [{**BLUE, "gsd": 0}, *OTHERS], "bands[0].gsd", {"value": 0}),
    ("bands", [], "bands", {"value": []}),
    ("display", [0.3, 0.0], "display", {"value": [0.3, 0.0]}),
    ("display", [0, 3000], "display", {"value": [0, 3000]}),
    ("purity", 60, "purity", {"value": 60}),
    ("classes", ["farm", "farm"], "classes", {"value": ["farm", "farm"]}),
    ("classes", [str(index) for index in range(256)], "classes", {"value": 256}),
    ("split", "chips", "split", {"value": "chips", "allowed": ("blocks", "random", "column")}),
    ("split", "column", "split", {"value": "column", "allowed": ("blocks", "random")}),
    ("gsd", -1.0, "gsd", {"value": -1}),
    ("bandz", 1, "bandz", {"value": 1}),
]


@pytest.mark.parametrize(("name", "value", "key", "fields"), INVALID_OPTIONS)
def test_validate_options_invalid_value_is_refused(tiles, tmp_path, name, value, key, fields):
    with raises(UserError, key=f"datasets.x.options.{key}", **fields):
        prepare(tile_dataset(tiles, options={name: value}), tmp_path)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"chip": 0}, ("chip",)),
        ({"block": 0}, ("block",)),
        ({"splits": None}, ("splits",)),
        ({"splits": None, "block": 0, "chip": 0}, ("splits", "block", "chip")),
    ],
)
def test_validate_options_missing_keys_are_listed(tiles, tmp_path, changes, missing):
    with raises(UserError, *missing, key=f"datasets.x.{missing[0]}", value=missing):
        prepare(tile_dataset(tiles, **changes), tmp_path)


@pytest.mark.parametrize("time", ["20170216", "16.2.2017", "2017-02-16T10:21+01:00", "0001-01-01"])
def test_prepare_time_in_another_format_is_refused(tiles, tmp_path, time):
    with raises(UserError, key="datasets.x.options.time", value=time):
        prepare(tile_dataset(tiles, options={"time": time}), tmp_path)
    folder, options = write_table(tiles, tmp_path, time=time)
    with raises(UserError, "tile_0000_0000.tif", folder / "labels.csv"):
        prepare(tile_dataset(folder, task="classification", chip=0, block=128, options=options), tmp_path)


@pytest.mark.parametrize(("a", "b"), [("Forest", "forest"), ("1", "1.0"), ("01", "1")])
def test_unique_class_names_alike_names_are_refused(a, b):
    with raises(UserError, "labels.csv", a, b, key="classes"):
        unique_class_names([a, b, "other"], "The labels of labels.csv")


def test_unique_class_names_are_sorted():
    assert unique_class_names({"3301010101", "3301010100", "b"}, "") == ["3301010100", "3301010101", "b"]


def test_normalize_unicode_composes_accents_and_strips_blanks():
    assert normalize_unicode(" fore\u0302t ") == "for\u00eat"
