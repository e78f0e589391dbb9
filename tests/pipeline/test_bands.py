import pytest

from pipeline import bands
from pipeline.backbones import dofa, efficientnet, prithvi
from pipeline.bands import SENTINEL2, Band, MissingBandsError, match_bands
from pipeline.errors import UserError

CSMASK = efficientnet.VARIANTS["csmask_b4"]
PRITHVI = prithvi.VARIANTS["prithvi_eo_v2_300_tl"]
DOFA = dofa.VARIANTS["dofa_large_patch16_224"]
RGBN = [
    Band("1", "red", 0.665, 1),
    Band("2", "green", 0.56, 1),
    Band("3", "blue", 0.49, 1),
    Band("4", "nir", 0.84, 1),
]


def names(seen):
    return [SENTINEL2[place].name for place in seen.positions]


def test_bands_follow_the_networks_order():
    assert names(match_bands("m", CSMASK, SENTINEL2, 64)) == ["B02", "B03", "B04", "B08", "B11", "B12"]
    assert names(match_bands("m", PRITHVI, SENTINEL2, 64)) == ["B02", "B03", "B04", "B8A", "B11", "B12"]
    assert names(match_bands("m", DOFA, SENTINEL2, 64)) == [band.name for band in SENTINEL2]


def test_wavelengths_go_with_their_bands():
    seen = match_bands("m", DOFA, SENTINEL2[::-1], 64)
    assert seen.input_names[0] == "swir22"
    assert seen.wavelengths == tuple(band.wavelength for band in SENTINEL2[::-1])


def test_a_missing_band_names_those_that_exist():
    with pytest.raises(
        MissingBandsError, match="csmask needs the bands swir16, swir22; these images have red, green, blue, nir"
    ):
        match_bands("csmask", CSMASK, RGBN, 64)


def test_what_can_be_done_without_is_left_away_and_the_broad_band_stands_in():
    seen = match_bands("m", PRITHVI, RGBN, 64)
    assert seen.input_names == ("blue", "green", "red", "nir08")
    assert seen.band_indices == (2, 1, 0, 3)
    assert match_bands("m", PRITHVI, RGBN[:3], 64).input_names == ("blue", "green", "red")
    with pytest.raises(MissingBandsError, match="needs the bands blue"):
        match_bands("m", PRITHVI, RGBN[:2], 64)


def test_bands_by_common_name_sensor_name_and_wavelength():
    assert (
        bands.band_index("nir08", SENTINEL2)
        == bands.band_index("B8A", SENTINEL2)
        == bands.band_index(0.86, SENTINEL2)
        == 8
    )
    assert bands.band_index(0.9, SENTINEL2) is None
    assert bands.band_index("thermal", SENTINEL2) is None
    assert names(match_bands("m", DOFA, SENTINEL2, 64, ["B12", 0.49, "red"])) == ["B12", "B02", "B04"]
    with pytest.raises(MissingBandsError, match="needs the bands 10.9"):
        match_bands("m", DOFA, SENTINEL2, 64, ["red", 10.9])


def test_bands_chosen_by_hand_fill_the_networks_inputs():
    other = match_bands("m", CSMASK, SENTINEL2, 64, ["B02", "B03", "B04", "B8A", "B11", "B12"])
    assert other.input_names == CSMASK.bands
    assert names(other)[3] == "B8A"
    turned = match_bands("m", CSMASK, SENTINEL2, 64, list(CSMASK.bands[::-1]))
    assert turned == match_bands("m", CSMASK, SENTINEL2, 64)  # known by name, whatever the order
    same = match_bands("m", efficientnet.VARIANTS["lite0"], SENTINEL2, 64, ["B11", "B11", "B11"])
    assert (same.input_names, same.band_indices) == (("red", "green", "blue"), (11, 11, 11))
    few = match_bands("m", PRITHVI, SENTINEL2, 64, ["swir16", "red", "nir"])
    assert few.input_names == ("red", "nir08", "swir16")
    with pytest.raises(UserError, match="takes the bands blue, green, red, nir08, swir16, swir22 or some of them"):
        match_bands("m", PRITHVI, SENTINEL2, 64, ["red", "cirrus"])
    with pytest.raises(UserError, match="its bands in params.yaml are red"):
        match_bands("m", CSMASK, SENTINEL2, 64, ["red"])


def test_units_are_declared_never_guessed():
    assert bands.full_scale("dn") == 10000
    assert bands.full_scale("uint8") == 255
    with pytest.raises(UserError, match="Known units: dn"):
        bands.full_scale("counts")


def test_wavelengths_rise_in_the_sensors_order():
    waves = [band.wavelength for band in SENTINEL2]
    assert waves == sorted(waves)
    assert len({band.common_name for band in SENTINEL2}) == 13
