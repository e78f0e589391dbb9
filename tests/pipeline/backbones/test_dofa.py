"""DOFA as terratorch builds it, against torchgeo itself and a file with the official layout."""

import numpy as np
import pytest
import torch
from torchgeo.models import DOFABase16_Weights, DOFALarge16_Weights
from torchgeo.models import dofa as torchgeo_dofa

from pipeline.backbones.catalog import DOFA
from pipeline.config import HubFile
from pipeline.errors import UserError
from tests.errors import raises

SMALL, FILE = "dofa_small_patch16_224", "small.pth"


@pytest.fixture(scope="module")
def official():
    """torchgeo's smallest network for 64 px, with position embeddings that are not zero."""
    torch.manual_seed(3)
    network = torchgeo_dofa.dofa_small_patch16_224(img_size=64).eval()
    torch.nn.init.normal_(network.pos_embed, std=0.02)
    return network


@pytest.fixture(scope="module")
def weights_dir(official, tmp_path_factory):
    """A folder with the network's file, as published: without the classifier and its normalisation."""
    folder = tmp_path_factory.mktemp("dofa")
    tensors = {k: v for k, v in official.state_dict().items() if not k.startswith(("fc_norm.", "head."))}
    torch.save(tensors, folder / FILE)
    return folder


@pytest.fixture
def dofa_encoder(images, weights_dir, make_encoder):
    def make(size=64, folder=weights_dir, **changes):
        hub = HubFile("torchgeo/dofa", FILE, "0" * 40)
        return make_encoder(images, "dofa", SMALL, size, folder, normalisation="dataset", hub=hub, **changes)

    return make


def test_dofa_features_equal_torchgeos_at_the_bands_wavelengths(official, images, dofa_encoder):
    encoder, image = dofa_encoder(bands=("B11", "B02", "B8A")), images.image[:2].values
    features = encoder(image)
    with torch.inference_mode():
        expected = official.forward_features(encoder.prepare(image), [1.614, 0.492, 0.865])
        normalised = official.fc_norm(torch.from_numpy(features.pooled["mean_level3"]))
    np.testing.assert_allclose(normalised, expected, rtol=1e-3, atol=1e-3)
    assert features.levels[0].shape == (2, 384, 4, 4)
    assert "cls_level3" in features.pooled
    # The wavelengths stay in float32 under autocast.
    embed, batch = encoder.network.network.dofa_model.patch_embed, encoder.prepare(image)
    wavelengths = torch.tensor(encoder.network.network.wavelengths)
    with torch.inference_mode():
        exact = embed(batch, wavelengths)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(embed(batch, wavelengths)[0], exact)


def test_dofa_at_another_size_resizes_the_position_embedding(official, images, dofa_encoder):
    encoder = dofa_encoder(size=32, bands=("B02",))
    pos_embed = encoder.network.network.dofa_model.pos_embed
    assert pos_embed.shape == (1, 5, 384)
    assert torch.equal(pos_embed[:, 0], official.pos_embed[:, 0])
    assert encoder(images.image[:1].values).levels[3].shape == (1, 384, 2, 2)


def test_dofa_catalog_names_torchgeos_files():
    for size, weights in (("base", DOFABase16_Weights), ("large", DOFALarge16_Weights)):
        file = DOFA[f"dofa_{size}_patch16_224"].weights
        assert weights.DOFA_MAE.url == f"https://hf.co/{file.repo}/resolve/{file.revision}/{file.file}"


def test_dofa_checkpoint_without_a_tensor_names_it(weights_dir, dofa_encoder, tmp_path):
    name = "patch_embed.weight_generator.bias_token"
    tensors = torch.load(weights_dir / FILE, weights_only=True)
    del tensors[name]
    torch.save(tensors, tmp_path / FILE)
    with raises(UserError, name, path=tmp_path / FILE, value=[name]):
        dofa_encoder(folder=tmp_path)


def test_dofa_with_a_band_without_wavelength_is_refused(images, make_encoder):
    images = images.copy()
    images["wavelength"] = images.wavelength.copy(data=[*images.wavelength.values[:-1], np.nan])
    with raises(UserError, "swir22", key="bands", value="swir22"):
        make_encoder(images, "dofa", SMALL, normalisation="dataset", bands=("B02", "B12"))
