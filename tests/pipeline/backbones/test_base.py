"""Specifications, feature pyramids, and the matching of bands; tests/test_adding.py has the registry."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.backbones import create_backbone, get_spec
from pipeline.backbones.base import FeaturePyramid, MissingBandsError, match_bands
from pipeline.backbones.catalog import DOFA, EFFICIENTNET, FAMILIES, PRITHVI
from pipeline.bands import SENTINEL2, Band
from pipeline.config import BackboneConfig
from pipeline.errors import UserError
from tests.errors import raises

CSMASK = EFFICIENTNET["csmask_b4"]
PRITHVI_300 = PRITHVI["prithvi_eo_v2_300_tl"]
DOFA_LARGE = DOFA["dofa_large_patch16_224"]
WAVELENGTHS = {"red": 0.665, "green": 0.56, "blue": 0.49, "nir": 0.84}
RGB_NIR = [Band(name[0], name, wavelength, 1) for name, wavelength in WAVELENGTHS.items()]


def band_names(input_bands):
    return [SENTINEL2[index].name for index in input_bands.band_indices]


@pytest.mark.parametrize(
    ("backbone", "mentions", "fields"),
    [
        (("vgg", "16", "random", 64), FAMILIES, {"key": "family", "value": "vgg", "allowed": FAMILIES}),
        (("efficientnet", "b7", "random", 64), ["csmask_b4"], {"key": "variant", "allowed": tuple(EFFICIENTNET)}),
        (("efficientnet", "lite0", "random", 100), [32], {"key": "input_size", "value": 100}),
        (("prithvi", "prithvi_eo_v2_600_tl", "random", 512), [14], {"key": "input_size", "value": 512}),
        (("dofa", "dofa_large_patch16_224", "random", 224), [], {"key": "normalisation", "allowed": ("dataset",)}),
        (("dofa", "dofa_small_patch16_224", "pretrained", 224, 0, "dataset"), [], {"allowed": ("random",)}),
        (("hiera", "sam2.1_hiera_t", "none", 64), [], {"key": "weights", "allowed": ("pretrained", "random")}),
        (("band_statistics", "mean_std", "random", 64), [], {"key": "weights", "allowed": ("none",)}),
        (("timm", "resnet19", "random", 64), ["resnet"], {"key": "variant", "value": "resnet19"}),
    ],
)
def test_get_spec_of_an_impossible_backbone_is_refused(backbone, mentions, fields):
    with raises(UserError, *mentions, **fields):
        get_spec(BackboneConfig(*backbone))


@pytest.mark.parametrize(
    ("key", "value"),
    [("input_units", "any"), ("layers", (1, 2)), ("options", {"depth": 3}), ("wavelengths", "image")],
)
def test_get_spec_of_a_catalog_family_refuses_keys_that_do_not_fit_it(key, value):
    with raises(UserError, key=key, value=value):
        get_spec(BackboneConfig("hiera", "sam2.1_hiera_t", "random", 64, **{key: value}))


def test_band_statistics_are_of_cells_and_of_the_whole_chip():
    backbone, image = BackboneConfig("band_statistics", "mean_std", "none", 64), torch.rand(2, 3, 64, 64)
    pyramid = create_backbone(backbone, get_spec(backbone), None, Path())(image)
    assert [tuple(level.shape) for level in pyramid.levels] == [(2, 6, 64 // s, 64 // s) for s in (4, 8, 16, 32)]
    cell, chip = image[1, 2, 8:12, 4:8].numpy(), image[0].numpy()
    np.testing.assert_allclose(pyramid.levels[0][1, [2, 5], 2, 1], [cell.mean(), cell.std()], rtol=1e-4)
    expected = np.concatenate([chip.mean((1, 2)), chip.std((1, 2))])
    np.testing.assert_allclose(pyramid.pooled["mean_std"][0], expected, rtol=1e-4)


def test_feature_pyramid_arrays_are_named_as_in_the_store():
    levels = [torch.rand(2, 3, 8, 8), torch.rand(2, 5, 4, 4)]
    arrays = FeaturePyramid.from_maps(levels).arrays()
    assert list(arrays) == ["level0/features", "level1/features", "pooled/mean_level0", "pooled/mean_level1"]
    assert arrays["level1/features"] is levels[1]
    torch.testing.assert_close(arrays["pooled/mean_level1"], levels[1].mean(dim=(2, 3)))


@pytest.mark.parametrize("n_class_tokens", [0, 1])
def test_feature_pyramid_from_tokens_restores_the_grid(n_class_tokens):
    tokens = torch.rand(2, n_class_tokens + 9, 4)
    pyramid = FeaturePyramid.from_outputs([tokens], 48)
    assert torch.equal(pyramid.levels[0][1, :, 2, 0], tokens[1, n_class_tokens + 6])
    assert list(pyramid.pooled) == ["mean_level0", "cls_level0"][: 1 + n_class_tokens]
    if n_class_tokens:
        assert torch.equal(pyramid.pooled["cls_level0"], tokens[:, 0])


# 4 registers and a class token with 14x14 patches; the same with 2x2 patches, which looks like a grid of 3x3
@pytest.mark.parametrize(("n_tokens", "input_size"), [(201, 224), (9, 32), (12, 48)])
def test_feature_pyramid_from_tokens_with_registers_is_refused(n_tokens, input_size):
    with raises(UserError, n_tokens, input_size, key="layers", value=(1, n_tokens, 4)):
        FeaturePyramid.from_outputs([torch.rand(1, n_tokens, 4)], input_size)


def test_feature_pyramid_from_outputs_accepts_maps_with_class_tokens():
    level, token = torch.rand(2, 3, 8, 8), torch.rand(2, 5)
    pyramid = FeaturePyramid.from_outputs([level, (level, token)], 64)
    assert list(pyramid.pooled) == ["mean_level0", "mean_level1", "cls_level1"]
    assert pyramid.levels[1] is level
    assert pyramid.pooled["cls_level1"] is token


def test_match_bands_follows_the_networks_order():
    csmask, prithvi, dofa = (match_bands("m", spec, SENTINEL2, 64) for spec in (CSMASK, PRITHVI_300, DOFA_LARGE))
    assert band_names(csmask) == ["B02", "B03", "B04", "B08", "B11", "B12"]
    assert band_names(prithvi) == ["B02", "B03", "B04", "B8A", "B11", "B12"]
    assert band_names(dofa) == ["B04", "B03", "B02", "B05", "B06", "B07", "B08", "B11", "B12"]


def test_match_bands_drops_optional_bands_uses_substitutes_and_names_what_is_missing():
    fields = {"value": ["swir16", "swir22"], "allowed": list(WAVELENGTHS)}
    with raises(MissingBandsError, "csmask", *WAVELENGTHS, key="backbones.csmask.bands", **fields):
        match_bands("csmask", CSMASK, RGB_NIR, 64)
    input_bands = match_bands("m", PRITHVI_300, RGB_NIR, 64)
    assert input_bands.input_names == ("blue", "green", "red", "nir08")
    assert input_bands.band_indices == (2, 1, 0, 3)
    assert input_bands.wavelengths == (0.49, 0.56, 0.665, 0.84)
    assert match_bands("m", PRITHVI_300, RGB_NIR[:3], 64).input_names == ("blue", "green", "red")
    with raises(MissingBandsError, value=["blue"]):
        match_bands("m", PRITHVI_300, RGB_NIR[:2], 64)


def test_match_bands_of_a_sensor_that_dofa_knows_gives_the_wavelengths_of_its_pretraining():
    trained = (0.665, 0.56, 0.49, 0.705, 0.74, 0.783, 0.842, 1.61, 2.19)
    own = (0.665, 0.56, 0.492, 0.704, 0.741, 0.783, 0.833, 1.614, 2.202)
    terratorch = (*trained[:6], 0.832, 1.61, 2.2)
    for table, expected in (("pretraining", trained), ("terratorch", terratorch), ("image", own)):
        assert match_bands("m", DOFA_LARGE, SENTINEL2, 64, (), table).wavelengths == expected
    # Other bands are used on request, or in place of an absent one, with the images' own wavelengths.
    assert match_bands("m", DOFA_LARGE, SENTINEL2, 64, ("B8A", "red")).wavelengths == (0.865, 0.665)
    without_nir = [band for band in SENTINEL2 if band.name not in ("B08", "B05")]
    assert match_bands("m", DOFA_LARGE, without_nir, 64).wavelengths == (*trained[:3], 0.74, 0.783, 0.865, 1.61, 2.19)
    photograph = [Band(name, name) for name in ("blue", "green", "red")]
    assert match_bands("m", DOFA_LARGE, photograph, 64).wavelengths == trained[:3]


def test_match_bands_of_a_sensor_that_dofa_does_not_know_gives_all_optical_bands_and_their_own_wavelengths():
    landsat = [
        Band("B1", "coastal", 0.443),
        Band("B2", "blue", 0.482),
        Band("B5", "nir08", 0.865),
        Band("QA", "mask"),
    ]
    assert match_bands("m", DOFA_LARGE, landsat, 64).wavelengths == (0.443, 0.482, 0.865)
    assert match_bands("m", DOFA_LARGE, landsat, 64, (), "terratorch").wavelengths == (0.44, 0.49, 0.864)
    with raises(MissingBandsError, "mask", key="backbones.m.bands", allowed=["mask"]):
        match_bands("m", DOFA_LARGE, landsat[3:], 64)


def test_match_bands_of_requested_bands_assigns_by_name_or_wavelength_else_in_order():
    assert band_names(match_bands("m", DOFA_LARGE, SENTINEL2, 64, ["B12", 0.49, "red"])) == ["B12", "B02", "B04"]
    with raises(MissingBandsError, value=["10.9"]):
        match_bands("m", DOFA_LARGE, SENTINEL2, 64, ["red", 10.9])
    input_bands = match_bands("m", CSMASK, SENTINEL2, 64, ["B02", "B03", "B04", "B8A", "B11", "B12"])
    assert input_bands.input_names == CSMASK.bands
    assert band_names(input_bands)[3] == "B8A"
    repeated = match_bands("m", EFFICIENTNET["lite0"], SENTINEL2, 64, ["B11", "B11", "B11"])
    assert (repeated.input_names, repeated.band_indices) == (("red", "green", "blue"), (11, 11, 11))
    reversed_bands = match_bands("m", CSMASK, SENTINEL2, 64, list(CSMASK.bands[::-1]))
    assert reversed_bands == match_bands("m", CSMASK, SENTINEL2, 64)
    subset = match_bands("m", PRITHVI_300, SENTINEL2, 64, ["swir16", "red", "nir"])
    assert subset.input_names == ("red", "nir08", "swir16")


@pytest.mark.parametrize(("spec", "requested"), [(PRITHVI_300, ["red", "cirrus"]), (CSMASK, ["red"])])
def test_match_bands_of_requested_bands_that_do_not_fit_is_refused(spec, requested):
    with raises(UserError, *spec.bands, *requested, key="backbones.m.bands", value=requested, allowed=spec.bands):
        match_bands("m", spec, SENTINEL2, 64, requested)
