import pytest

from pipeline import bands
from pipeline.bands import SENTINEL2, Band
from pipeline.errors import UserError
from tests.errors import raises


@pytest.mark.parametrize(("query", "index"), [("nir08", 8), ("B8A", 8), (0.86, 8), (0.9, None), ("thermal", None)])
def test_band_index_finds_common_name_sensor_name_and_wavelength(query, index):
    assert bands.band_index(query, SENTINEL2) == index


RADAR = Band("VV", "sar_vv")
LANDSAT8_RGB = (Band("B2", "blue", 0.482), Band("B3", "green", 0.561), Band("B4", "red", 0.655))
HARMONIZED_LANDSAT = (Band("B02", "blue", 0.482), Band("B05", "nir08", 0.865))


@pytest.mark.parametrize(
    ("images", "sensor"),
    [
        (SENTINEL2, "sentinel2"),
        ((*SENTINEL2[1:4], RADAR), "sentinel2"),
        ((Band("B8A", "nir08"),), "sentinel2"),  # without a wavelength
        ((Band("B12", "swir22", 2.186),), "sentinel2"),  # of Sentinel-2B
        (LANDSAT8_RGB, "rgb"),
        ((Band("R", "red"), Band("G", "green"), Band("B", "blue")), "rgb"),
        ((*LANDSAT8_RGB, Band("B5", "nir08", 0.865)), ""),
        (HARMONIZED_LANDSAT, ""),
        ((Band("B04", "red", 0.62), Band("B08", "nir", 0.833)), ""),
        ((RADAR,), ""),
    ],
)
def test_sensor_is_known_by_the_names_of_optical_bands(images, sensor):
    assert bands.sensor(images) == sensor


def test_full_scale_knows_declared_units_only():
    assert bands.full_scale("dn") == 10000
    with raises(UserError, "dn", key="units", value="counts", allowed=bands.FULL_SCALE):
        bands.full_scale("counts")


def test_sentinel2_wavelengths_rise_in_the_sensors_order():
    wavelengths = [band.wavelength for band in SENTINEL2]
    assert wavelengths == sorted(wavelengths)
    assert len({band.common_name for band in SENTINEL2}) == 13
