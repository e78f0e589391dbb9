"""Backbones of the registries of timm and terratorch, which only params.yaml describes."""

import numpy as np
import pytest
import timm
import torch
from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY

from pipeline.config import HubFile
from pipeline.data import image_store
from pipeline.errors import UserError
from tests.errors import raises

MOCO = "ssl4eos12_resnet18_sentinel2_all_moco"
OPTIONS = {"model_bands": ["BLUE", "GREEN", "RED"], "out_indices": [1, 2, 3, 4]}
RGB = ("blue", "green", "red")
KEYS = {"bands": RGB, "input_units": "reflectance", "normalisation": "dataset", "options": OPTIONS}


@pytest.mark.parametrize(("variant", "channels"), [("resnet18", 512), ("vit_tiny_patch16_224", 192)])
def test_timm_network_gives_a_pyramid_with_its_own_normalisation(variant, channels, images_path, make_encoder):
    images = image_store.open_images(images_path("sample-trees"))
    encoder = make_encoder(images, "timm", variant, 64)
    image = images.image[:2].values
    pyramid = encoder(image)
    assert len(pyramid.levels) == 4
    assert pyramid.levels[-1].shape[:2] == (2, channels)
    pretrained = timm.get_pretrained_cfg(variant)
    mean, std = np.reshape(pretrained.mean, (3, 1, 1)), np.reshape(pretrained.std, (3, 1, 1))
    np.testing.assert_allclose(encoder.prepare(image), (image / 255 - mean) / std, atol=1e-5)


@pytest.mark.parametrize(("family", "variant", "keys"), [("timm", "resnet18", {}), ("terratorch", MOCO, KEYS)])
def test_registry_weights_have_the_registrys_layout_and_give_its_levels(
    images, make_encoder, tmp_path, family, variant, keys
):
    torch.manual_seed(3)
    is_timm = family == "timm"
    official = timm.create_model(variant) if is_timm else TERRATORCH_BACKBONE_REGISTRY.build(variant, **OPTIONS)
    torch.save(official.eval().state_dict(), tmp_path / "model.pt")
    keys, image = {**keys, "hub": HubFile("someone/x", "model.pt", "0" * 40)}, images.image[:2].values
    encoder = make_encoder(images, family, variant, 64, tmp_path, **keys)
    prepared, levels = encoder.prepare(image), encoder(image).levels
    assert [level.shape[1:] for level in levels] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    with torch.inference_mode():
        expected = [official.forward_features(prepared)] if is_timm else official(prepared)
    for level, expected_level in zip(levels[-len(expected) :], expected, strict=True):
        np.testing.assert_allclose(level, expected_level, rtol=1e-4, atol=1e-4)
    torch.save({"fc.bias": torch.zeros(1000)}, tmp_path / "model.pt")
    with raises(UserError, "conv1.weight", path=tmp_path / "model.pt"):
        make_encoder(images, family, variant, 64, tmp_path, **keys)


def test_timm_network_on_four_bands_uses_the_datasets_statistics(images, make_encoder):
    keys = {"bands": ("red", "nir", "B11", 0.49), "input_units": "reflectance", "normalisation": "dataset"}
    encoder, image = make_encoder(images, "timm", "resnet18", 64, **keys), images.image[:1].values
    assert encoder.prepare(image).shape == (1, 4, 64, 64)
    assert encoder(image).levels[0].shape[1] == 64


def test_terratorch_tokens_become_maps(images, make_encoder):
    keys = {**KEYS, "options": {"bands": ["BLUE", "GREEN", "RED"], "num_frames": 1}, "layers": (1, 3)}
    encoder = make_encoder(images, "terratorch", "prithvi_eo_tiny", 224, **keys)
    pyramid = encoder(images.image[:1].values)
    assert [level.shape for level in pyramid.levels] == [(1, 256, 14, 14)] * 2
    assert list(pyramid.pooled) == ["mean_level0", "mean_level1", "cls_level0", "cls_level1"]


def test_terratorch_description_that_does_not_fit_is_refused(images, make_encoder):
    with raises(UserError, "moco", key="variant", value="moco", allowed=sorted(TERRATORCH_BACKBONE_REGISTRY)):
        make_encoder(images, "terratorch", "moco", 64, **KEYS)
    options = {"colour": "red"}
    with raises(UserError, MOCO, options, key="options", value=options):
        make_encoder(images, "terratorch", MOCO, 64, **{**KEYS, "options": options})
    encoder = make_encoder(images, "terratorch", MOCO, 64, **{**KEYS, "options": {"model_bands": ["B", "G", "R"]}})
    with raises(UserError, MOCO, key="layers", allowed=(0,)):
        encoder(images.image[:1].values)
