"""Levels, class tokens and options of backbones from terratorch's registry, with random weights."""

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from tests.errors import raises

BANDS = ["BLUE", "GREEN", "RED"]
KEYS = {"bands": ("blue", "green", "red"), "input_units": "reflectance", "normalisation": "dataset"}


@pytest.mark.parametrize(
    ("variant", "options", "allowed"),
    [("prithvi_eo_tiny", {"num_frames": 1}, "num_frames"), ("dinov3_vits16", {}, "return_cls_token")],
)
def test_terratorch_options_that_a_builder_ignores_are_refused(
    variant, options, allowed, dinov3, images, make_encoder
):
    with raises(UserError, "colour", key="options", value=["colour"]) as info:
        make_encoder(images, "terratorch", variant, 224, **{**KEYS, "options": {**options, "colour": "red"}})
    assert {allowed, "vit_adapter" if options else "ckpt_path"} <= set(info.value.allowed)


@pytest.mark.parametrize("option", ["pretrained", "ckpt_path"])
def test_terratorch_options_that_load_weights_are_refused(option, images, make_encoder):
    with raises(UserError, "weights", key=f"options.{option}", value="x", allowed=("weights", "hub")):
        make_encoder(images, "terratorch", "prithvi_eo_tiny", 224, **{**KEYS, "options": {option: "x"}})


class TinyDinoV3(torch.nn.Module):
    """The interface of the official vision transformer, with twelve blocks."""

    embed_dim, blocks = 3, tuple(range(12))

    def get_intermediate_layers(self, image, n, reshape=False, return_class_token=False):
        means = torch.nn.functional.avg_pool2d(image, 16)
        levels = [means + index for index in n]
        levels = levels if reshape else [level.flatten(2).transpose(1, 2) for level in levels]
        tokens = [torch.full((len(image), 3), 100.0 + index) for index in n]
        return list(zip(levels, tokens, strict=True)) if return_class_token else levels


@pytest.fixture
def dinov3(monkeypatch):
    monkeypatch.setattr(torch.hub, "load", lambda *arguments, **keywords: TinyDinoV3())


@pytest.mark.parametrize("has_class_token", [True, False])
def test_terratorch_dinov3_patches_keep_their_cells(has_class_token, dinov3, images, make_encoder):
    options = {} if has_class_token else {"return_cls_token": False}
    encoder = make_encoder(images, "terratorch", "dinov3_vits16", 64, **{**KEYS, "options": options})
    image = images.image[:2].values
    pyramid, means = encoder(image), torch.nn.functional.avg_pool2d(encoder.prepare(image), 16)
    for level, depth in enumerate((2, 5, 8, 11)):
        np.testing.assert_allclose(pyramid.levels[level], means + depth, rtol=1e-5)
        if has_class_token:
            np.testing.assert_array_equal(pyramid.pooled[f"cls_level{level}"], 100.0 + depth)
    assert len(pyramid.pooled) == (8 if has_class_token else 4)


def test_terratorch_torchgeo_transformer_has_its_class_token_norm_and_out_indices(images, make_encoder):
    options = {"model_bands": BANDS, "depth": 4, "img_size": 64}
    variant = "ssl4eos12_vit_small_patch16_224_sentinel2_all_moco"
    encoder = make_encoder(images, "terratorch", variant, 64, **{**KEYS, "options": options})
    image = images.image[:1].values
    with torch.inference_mode():
        final = encoder.network.network.vit_model.forward_features(encoder.prepare(image)).numpy()
    pyramid = encoder(image)
    np.testing.assert_allclose(pyramid.pooled["cls_level3"], final[:, 0], rtol=1e-4, atol=1e-4)
    patches = final[:, 1:].reshape(1, 4, 4, -1).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(pyramid.levels[3], patches, rtol=1e-4, atol=1e-4)
    keys = {**KEYS, "options": {**options, "out_indices": [1, 3]}, "layers": (0, 1)}
    selected = make_encoder(images, "terratorch", variant, 64, **keys)(image)
    np.testing.assert_allclose(selected.levels, [pyramid.levels[1], pyramid.levels[3]], rtol=1e-4, atol=1e-4)


def test_terratorch_swin_maps_have_channels_first(images, make_encoder):
    options = {"model_bands": BANDS, "out_indices": [1, 3, 5, 7]}
    encoder = make_encoder(images, "terratorch", "satlas_swin_t_sentinel2_si_rgb", 64, **{**KEYS, "options": options})
    image = images.image[:1].values
    shapes = [level.shape for level in encoder(image).levels]
    assert shapes == [(1, 96, 16, 16), (1, 192, 8, 8), (1, 384, 4, 4), (1, 768, 2, 2)]
