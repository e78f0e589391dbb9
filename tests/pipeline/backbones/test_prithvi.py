"""Prithvi as terratorch builds it, against terratorch itself and files with the official layout."""

import numpy as np
import pytest
import torch
from terratorch.datasets import HLSBands
from terratorch.models.backbones.prithvi_vit import (
    PRITHVI_V2_MEAN,
    PRITHVI_V2_STD,
    _create_prithvi,
    pretrained_weights,
    prithvi_cfgs,
)
from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY

from pipeline.backbones.catalog import PRITHVI
from pipeline.backbones.prithvi import PatchConv3d
from pipeline.data import image_store
from pipeline.errors import UserError
from tests.errors import raises

TINY = "prithvi_eo_v2_tiny_tl"


@pytest.fixture(scope="module")
def official():
    """The masked autoencoder with four frames, as it is published: encoder and decoder."""
    torch.manual_seed(3)
    return _create_prithvi(TINY, num_frames=4, encoder_only=False)


@pytest.fixture
def weights_dir(official, tmp_path):
    torch.save(official.state_dict(), tmp_path / PRITHVI[TINY].weights_file)
    return tmp_path


@pytest.fixture
def images(images_path):
    return image_store.open_images(images_path("sample-landuse-seg"))


def official_levels(weights_dir, image, bands=None, **coordinates):
    """Return the levels that terratorch computes from the same file."""
    network = TERRATORCH_BACKBONE_REGISTRY.build(
        TINY,
        pretrained=True,
        ckpt_path=str(weights_dir / PRITHVI[TINY].weights_file),
        bands=bands,
        num_frames=1,
    )
    with torch.inference_mode():
        outputs = network.eval()(image, **coordinates)
        return network.prepare_features_for_image_model([outputs[index] for index in PRITHVI[TINY].layer_indices])


def test_prithvi_levels_with_location_and_time_equal_terratorchs(weights_dir, images, make_encoder):
    encoder = make_encoder(images, "prithvi", TINY, 224, weights_dir)
    image, metadata = images.image[:2].values, encoder.preprocessor.metadata(images, slice(0, 2))
    features = encoder(image, metadata)
    expected = official_levels(
        weights_dir,
        encoder.prepare(image),
        temporal_coords=torch.from_numpy(metadata["time"]),
        location_coords=torch.from_numpy(metadata["location"]),
    )
    assert features.levels[0].shape == (2, 192, 14, 14)
    for level, expected_level in zip(features.levels, expected, strict=True):
        np.testing.assert_allclose(level, expected_level, rtol=1e-4, atol=1e-4)
    without_metadata = encoder(image, {})
    assert np.abs(without_metadata.levels[3] - features.levels[3]).max() > 1e-3
    assert list(features.pooled) == [f"{kind}_level{i}" for kind in ("mean", "cls") for i in range(4)]


def test_prithvi_input_is_normalised_as_its_authors_do(images, make_encoder):
    """Their mean and standard deviation are of digital numbers, as the image is."""
    encoder = make_encoder(images, "prithvi", TINY, 128)
    image = images.image[:1].sel(band=["blue", "green", "red", "nir08", "swir16", "swir22"]).values.astype("float32")
    expected = (image - np.reshape(PRITHVI_V2_MEAN, (6, 1, 1))) / np.reshape(PRITHVI_V2_STD, (6, 1, 1))
    np.testing.assert_allclose(encoder.prepare(images.image[:1].values), expected, atol=1e-4)


def test_prithvi_with_fewer_bands_uses_their_columns(weights_dir, official, images, make_encoder):
    encoder = make_encoder(images, "prithvi", TINY, 224, weights_dir, bands=("red", "nir", "swir16"))
    image = images.image[:1].values
    bands = [HLSBands.RED, HLSBands.NIR_NARROW, HLSBands.SWIR_1]
    expected = official_levels(weights_dir, encoder.prepare(image), bands)
    np.testing.assert_allclose(encoder(image).levels[3], expected[3], rtol=1e-4, atol=1e-4)
    columns = official.state_dict()["encoder.patch_embed.proj.weight"][:, [2, 3, 4]]
    assert torch.equal(encoder.network.network.patch_embed.proj.weight, columns)


def test_prithvi_years_and_days_stay_in_float32_under_autocast(weights_dir, images, make_encoder):
    """In bfloat16 the year 2017 would be 2016, and the embedding with it."""
    encoder = make_encoder(images, "prithvi", TINY, 224, weights_dir)
    embed = encoder.network.network.temporal_embed_enc
    time = torch.tensor([[[2017.0, 46.0]]])
    with torch.inference_mode():
        expected = embed(time)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(embed(time), expected)
    assert not torch.allclose(embed(torch.tensor([[[2016.0, 46.0]]])), expected, atol=1e-3)


@pytest.mark.parametrize("variant", list(PRITHVI))
def test_prithvi_catalog_agrees_with_terratorch(variant):
    config, spec = prithvi_cfgs[variant], PRITHVI[variant]
    assert spec.layer_indices == tuple(config["depth"] // 4 * quarter - 1 for quarter in (1, 2, 3, 4))
    assert spec.strides == (config["patch_size"][1],) * 4
    assert config["bands"] == prithvi_cfgs[TINY]["bands"]
    official = pretrained_weights[variant]
    assert (spec.weights.repo, spec.weights.file) == (official["hf_hub_id"], official["hf_hub_filename"])


def test_prithvi_checkpoint_of_another_layout_is_refused_by_name(weights_dir, images, make_encoder):
    path, name = weights_dir / PRITHVI[TINY].weights_file, "blocks.3.norm1.bias"
    tensors = torch.load(path, weights_only=True)
    del tensors[f"encoder.{name}"]
    for damaged, mentions in ((tensors, [name]), ({"decoder.x": torch.zeros(1)}, ["encoder.", "decoder.x"])):
        torch.save(damaged, path)
        with raises(UserError, *mentions, path=path):
            make_encoder(images, "prithvi", TINY, 224, weights_dir)


@pytest.mark.parametrize(
    ("shape", "kernel", "bias"),
    [
        ((2, 3, 1, 28, 28), (1, 14, 14), True),
        ((1, 3, 1, 31, 45), (1, 16, 8), False),
        ((1, 3, 5, 6, 9), (2, 3, 3), True),
    ],
)
def test_patch_conv3d_equals_torchs_convolution(shape, kernel, bias):
    conv = torch.nn.Conv3d(3, 5, kernel, stride=kernel, bias=bias)
    image = torch.randn(shape).to(memory_format=torch.channels_last_3d)
    expected = conv(image)
    conv.__class__ = PatchConv3d
    assert torch.equal(conv(image), expected)  # on a CPU it convolves
    torch.testing.assert_close(conv.as_matrix_product(image), expected)
