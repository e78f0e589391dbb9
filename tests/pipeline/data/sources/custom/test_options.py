"""Options of custom data, and names of classes."""

import numpy as np
import pytest

from pipeline.data.sources import validate
from pipeline.data.sources.custom.options import check_band_means, unique_class_names
from pipeline.errors import UserError
from tests.errors import raises
from tests.pipeline.data.sources.custom.custom_data import BLUE_GREEN_RED, make_options, tile_dataset

FIRST, *OTHERS = BLUE_GREEN_RED


@pytest.mark.parametrize(
    ("name", "value", "key", "fields"),
    [
        ("units", "dm", "units", {"value": "dm", "allowed": ("dn", "reflectance", "uint8", "display")}),
        ("bands", [{**FIRST, "wavelength": 492}, *OTHERS], "bands[0].wavelength", {"value": 492}),
        ("bands", [{**FIRST, "gsd": 0}, *OTHERS], "bands[0].gsd", {"value": 0}),
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
        ("time", "20170216", "time", {"value": "20170216"}),
    ],
)
def test_validate_options_invalid_value_is_refused(tmp_path, name, value, key, fields):
    with raises(UserError, key=f"datasets.x.options.{key}", **fields):
        validate("x", tile_dataset(tmp_path, options={name: value}))


def test_validate_options_missing_keys_are_listed(tmp_path):
    for missing in ({"chip": 0}, {"splits": None, "block": 0, "chip": 0}):
        with raises(UserError, *missing, key=f"datasets.x.{next(iter(missing))}", value=tuple(missing)):
            validate("x", tile_dataset(tmp_path, **missing))


@pytest.mark.parametrize(
    ("units", "means", "fields"),
    [("reflectance", (900.0, 0.1, 0.1), {"key": "units", "value": "reflectance"}),
     ("dn", (300.0, -3000.0, 100.0), {"key": "B03", "value": -3000.0})],
)  # fmt: skip
def test_check_band_means_impossible_means_are_refused(tmp_path, units, means, fields):
    with raises(UserError, **fields):
        check_band_means(make_options(tmp_path, units=units), np.array(means))
    check_band_means(make_options(tmp_path, units=units), np.full(3, 0.5))


@pytest.mark.parametrize(("a", "b"), [("Forest", "forest"), ("1", "1.0"), ("01", "1")])
def test_unique_class_names_alike_names_are_refused(a, b):
    with raises(UserError, "labels.csv", a, b, key="classes"):
        unique_class_names([a, b, "other"], "The labels of labels.csv")
    # Long numbers are all kept.
    assert unique_class_names({"3301010101", "3301010100", "b"}, "") == ["3301010100", "3301010101", "b"]
