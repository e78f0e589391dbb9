import pytest

from pipeline import bands
from pipeline.bands import SENTINEL2
from pipeline.errors import UserError
from tests.errors import raises


@pytest.mark.parametrize(("query", "index"), [("nir08", 8), ("B8A", 8), (0.86, 8), (0.9, None), ("thermal", None)])
def test_band_index_finds_common_name_sensor_name_and_wavelength(query, index):
    assert bands.band_index(query, SENTINEL2) == index


def test_full_scale_knows_declared_units_only():
    assert bands.full_scale("dn") == 10000
    with raises(UserError, "dn", key="units", value="counts", allowed=bands.FULL_SCALE):
        bands.full_scale("counts")


def test_sentinel2_wavelengths_rise_in_the_sensors_order():
    wavelengths = [band.wavelength for band in SENTINEL2]
    assert wavelengths == sorted(wavelengths)
    assert len({band.common_name for band in SENTINEL2}) == 13
