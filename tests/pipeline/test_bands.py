import numpy as np
import pytest

from pipeline import bands
from pipeline.errors import UserError

NAMES = [band.common_name for band in bands.SENTINEL2]


def test_selection_follows_the_wanted_order():
    assert bands.select(["swir16", "blue"], NAMES) == [11, 1]


def test_a_missing_band_names_those_that_exist():
    with pytest.raises(UserError, match="thermal are wanted, but these images have red, green"):
        bands.select(["red", "thermal"], ["red", "green"])


def test_left_out_by_the_stated_rule():
    assert bands.left_out("m", ["red"], ["red", "green"]) is None
    assert bands.left_out("m", None, ["x"]) is None
    assert "nir" in bands.left_out("m", ["red", "nir"], ["red"])


def test_units_are_declared_never_guessed():
    assert bands.to_unit_scale(np.array([2500], dtype=np.uint16), "dn") == np.float32(0.25)
    assert bands.to_unit_scale(np.array([255], dtype=np.uint8), "uint8") == 1
    with pytest.raises(UserError, match="Known units: dn"):
        bands.to_unit_scale(np.zeros(1), "counts")


def test_wavelengths_rise_in_the_sensors_order():
    waves = [band.wavelength for band in bands.SENTINEL2]
    assert waves == sorted(waves)
    assert len(set(NAMES)) == 13
