"""Levels and class tokens of networks from timm, with random weights."""

import numpy as np
import pytest
import torch

from pipeline.backbones import get_spec
from pipeline.config import BackboneConfig
from pipeline.errors import UserError
from tests.errors import raises

# Small versions of DINOv2, DINOv3, CLIP and a network without a class token.
# Columns: variant, options, input size, prefix tokens (class and registers).
WIDTH = {"embed_dim": 48, "num_heads": 3}
TRANSFORMERS = [
    ("vit_small_patch14_dinov2", WIDTH | {"depth": 8}, 56, 1),
    ("vit_small_patch14_reg4_dinov2", WIDTH | {"depth": 8}, 56, 5),
    ("vit_small_patch16_dinov3", WIDTH | {"depth": 8}, 64, 5),
    ("vit_base_patch32_clip_224", WIDTH | {"depth": 8}, 64, 1),
    ("vit_medium_patch16_reg4_gap_256", WIDTH | {"depth": 8}, 64, 4),
]


@pytest.mark.parametrize(("variant", "options", "input_size", "n_prefix"), TRANSFORMERS)
def test_timm_transformer_levels_are_normalised_patch_tokens_of_four_depths(
    variant, options, input_size, n_prefix, images, make_encoder
):
    encoder = make_encoder(images, "timm", variant, input_size, options=options)
    network, image = encoder.network.network, images.image[:2].values
    network.eval()
    blocks: list = []
    for block in network.blocks:
        block.register_forward_hook(lambda *arguments: blocks.append(arguments[2]))
    with torch.inference_mode():
        final = network.forward_features(encoder.prepare(image))
        tokens = [network.norm(blocks[index]).numpy() for index in (1, 3, 5, 7)]
    np.testing.assert_allclose(tokens[3], final, rtol=1e-4, atol=1e-4)
    pyramid = encoder(image)
    side = input_size // network.patch_embed.patch_size[0]
    assert final.shape[1] == n_prefix + side * side
    for index in range(4):
        patches = tokens[index][:, n_prefix:].reshape(2, side, side, -1).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(pyramid.levels[index], patches, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(pyramid.pooled[f"mean_level{index}"], patches.mean((2, 3)), rtol=1e-3, atol=1e-4)
        if n_prefix != 4:  # that one has registers, and no class token
            np.testing.assert_allclose(pyramid.pooled[f"cls_level{index}"], tokens[index][:, 0], rtol=1e-3, atol=1e-4)
    assert len(pyramid.pooled) == (4 if n_prefix == 4 else 8)


@pytest.mark.parametrize(
    ("variant", "options", "names"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": [1, 1, 2, 1]}, "layers"),
        ("convnext_atto", {"depths": [1, 1, 2, 1]}, "stages"),
    ],
)
def test_timm_hierarchical_network_gives_its_last_four_stages(variant, options, names, images, make_encoder):
    encoder = make_encoder(images, "timm", variant, 64, options=options)
    image = images.image[:2].values
    pyramid = encoder(image)
    assert [level.shape[-1] for level in pyramid.levels] == [16, 8, 4, 2]
    with torch.inference_mode():
        final = encoder.network.network.forward_features(encoder.prepare(image)).numpy()
    final = final.transpose(0, 3, 1, 2) if names == "layers" else final
    np.testing.assert_allclose(pyramid.levels[3], final, rtol=1e-4, atol=1e-4)
    spec = get_spec(BackboneConfig("timm", variant, "random", 64, options=options))
    assert spec.layers == tuple(f"{names}.{index}" for index in range(4))


def test_timm_sam_levels_are_those_before_its_neck(images, make_encoder):
    encoder = make_encoder(images, "timm", "samvit_base_patch16", 64, options=WIDTH | {"depth": 4, "img_size": 64})
    assert [level.shape[1:] for level in encoder(images.image[:1].values).levels] == [(48, 4, 4)] * 4


def test_timm_layers_select_outputs(images, make_encoder):
    variant, options = "vit_tiny_patch16_224", {"depth": 6}
    image = images.image[:1].values
    all_levels = make_encoder(images, "timm", variant, 64, options=options, layers=tuple(range(6)))(image).levels
    levels = make_encoder(images, "timm", variant, 64, options=options, layers=(1, -2))(image).levels
    assert [level.tolist() for level in levels] == [all_levels[index].tolist() for index in (1, 4)]
    spec = get_spec(BackboneConfig("timm", variant, "random", 64, options=options, layers=(1, -2)))
    assert (spec.layers, spec.layer_indices, spec.strides) == (("blocks.1", "blocks.4"), (1, 4), (16, 16))


@pytest.mark.parametrize("layers", [(6,), (-7,), (3, 1), (1, -5)])
def test_timm_layers_that_do_not_exist_or_are_not_increasing_are_refused(layers):
    backbone = BackboneConfig("timm", "vit_tiny_patch16_224", "random", 64, options={"depth": 6}, layers=layers)
    with raises(UserError, "vit_tiny_patch16_224", key="layers", value=layers, allowed=range(-6, 6)):
        get_spec(backbone)


def test_timm_options_and_sizes_that_do_not_fit_are_refused():
    def backbone(size=64, **options):
        return BackboneConfig("timm", "vit_tiny_patch16_224", "random", size, options=options)

    with raises(UserError, "colour", key="options", value={"colour": "red"}):
        get_spec(backbone(colour="red"))
    with raises(UserError, "pretrained", "weights", key="options.pretrained", value=True, allowed=("weights",)):
        get_spec(backbone(pretrained=True))
    with raises(UserError, "in_chans", "bands", key="options.in_chans", value=4, allowed=("bands",)):
        get_spec(backbone(in_chans=4))
    with raises(UserError, 16, key="input_size", value=100):
        get_spec(backbone(size=100))
