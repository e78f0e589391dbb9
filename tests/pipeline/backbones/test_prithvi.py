"""Prithvi as terratorch builds it, against terratorch itself and files with the official layout."""

import numpy as np
import pytest
import torch
from terratorch.datasets import HLSBands
from terratorch.models.backbones import prithvi_vit
from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY

from pipeline.backbones.catalog import PRITHVI
from pipeline.backbones.prithvi import PatchConv3d
from pipeline.errors import UserError
from tests.errors import raises

TINY = "prithvi_eo_v2_tiny_tl"


@pytest.fixture(scope="module")
def official():
    """The masked autoencoder with four frames, as it is published: encoder and decoder."""
    torch.manual_seed(3)
    return prithvi_vit._create_prithvi(TINY, num_frames=4, encoder_only=False)


@pytest.fixture(scope="module")
def weights_dir(official, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prithvi")
    torch.save(official.state_dict(), folder / PRITHVI[TINY].weights_file)
    return folder


def official_levels(weights_dir, image, bands=None, **coordinates):
    """Return the levels that terratorch computes from the same file."""
    path = str(weights_dir / PRITHVI[TINY].weights_file)
    network = TERRATORCH_BACKBONE_REGISTRY.build(TINY, pretrained=True, ckpt_path=path, bands=bands, num_frames=1)
    with torch.inference_mode():
        outputs = network.eval()(image, **coordinates)
        return network.prepare_features_for_image_model([outputs[index] for index in PRITHVI[TINY].layer_indices])


def test_prithvi_levels_with_location_and_time_equal_terratorchs(weights_dir, images, make_encoder):
    encoder = make_encoder(images, "prithvi", TINY, 224, weights_dir)
    image, metadata = images.image[:2].values, encoder.preprocessor.metadata(images, slice(0, 2))
    features = encoder(image, metadata)
    time, location = (torch.from_numpy(metadata[name]) for name in ("time", "location"))
    prepared = encoder.prepare(image)
    expected = official_levels(weights_dir, prepared, temporal_coords=time, location_coords=location)
    assert features.levels[0].shape == (2, 192, 14, 14)
    for level, expected_level in zip(features.levels, expected, strict=True):
        np.testing.assert_allclose(level, expected_level, rtol=1e-4, atol=1e-4)
    without_metadata = encoder(image, {})
    assert np.abs(without_metadata.levels[3] - features.levels[3]).max() > 1e-3
    assert list(features.pooled) == [f"{kind}_level{i}" for kind in ("mean", "cls") for i in range(4)]
    # In bfloat16 the year 2017 would be 2016, and the embedding with it.
    embed, time = encoder.network.network.temporal_embed_enc, torch.tensor([[[2017.0, 46.0]]])
    with torch.inference_mode():
        exact = embed(time)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(embed(time), exact)
    assert not torch.allclose(embed(torch.tensor([[[2016.0, 46.0]]])), exact, atol=1e-3)


def test_prithvi_with_fewer_bands_uses_their_columns(weights_dir, official, images, make_encoder):
    encoder = make_encoder(images, "prithvi", TINY, 224, weights_dir, bands=("red", "nir", "swir16"))
    image = images.image[:1].values
    bands = [HLSBands.RED, HLSBands.NIR_NARROW, HLSBands.SWIR_1]
    expected = official_levels(weights_dir, encoder.prepare(image), bands)
    np.testing.assert_allclose(encoder(image).levels[3], expected[3], rtol=1e-4, atol=1e-4)
    columns = official.state_dict()["encoder.patch_embed.proj.weight"][:, [2, 3, 4]]
    assert torch.equal(encoder.network.network.patch_embed.proj.weight, columns)


@pytest.mark.parametrize("variant", list(PRITHVI))
def test_prithvi_catalog_agrees_with_terratorch(variant):
    config, spec = prithvi_vit.prithvi_cfgs[variant], PRITHVI[variant]
    assert spec.layer_indices == tuple(config["depth"] // 4 * quarter - 1 for quarter in (1, 2, 3, 4))
    assert spec.strides == (config["patch_size"][1],) * 4
    statistics = np.array([prithvi_vit.PRITHVI_V2_MEAN, prithvi_vit.PRITHVI_V2_STD]) / 10_000
    np.testing.assert_allclose([spec.mean, spec.std], statistics)
    assert config["bands"] == prithvi_vit.prithvi_cfgs[TINY]["bands"]
    official = prithvi_vit.pretrained_weights[variant]
    assert (spec.weights.repo, spec.weights.file) == (official["hf_hub_id"], official["hf_hub_filename"])


def test_prithvi_checkpoint_of_another_layout_is_refused_by_name(official, tmp_path, images, make_encoder):
    path, name = tmp_path / PRITHVI[TINY].weights_file, "blocks.3.norm1.bias"
    tensors = {key: tensor for key, tensor in official.state_dict().items() if key != f"encoder.{name}"}
    for damaged, mentions in ((tensors, [name]), ({"decoder.x": torch.zeros(1)}, ["encoder.", "decoder.x"])):
        torch.save(damaged, path)
        with raises(UserError, *mentions, path=path):
            make_encoder(images, "prithvi", TINY, 224, tmp_path)


@pytest.mark.parametrize(
    ("shape", "kernel", "bias"), [((2, 3, 1, 28, 28), (1, 14, 14), True), ((1, 3, 5, 7, 9), (2, 3, 4), False)]
)
def test_patch_conv3d_equals_torchs_convolution(shape, kernel, bias):
    conv = torch.nn.Conv3d(3, 5, kernel, stride=kernel, bias=bias)
    image = torch.randn(shape).to(memory_format=torch.channels_last_3d)
    expected = conv(image)
    conv.__class__ = PatchConv3d
    assert torch.equal(conv(image), expected)  # on a CPU it convolves
    torch.testing.assert_close(conv.as_matrix_product(image), expected)
