"""DOFA as terratorch builds it, against torchgeo itself and a file with the official layout."""

import numpy as np
import pytest
import torch
from torchgeo.models import DOFABase16_Weights, DOFALarge16_Weights
from torchgeo.models import dofa as torchgeo_dofa

from pipeline.backbones.catalog import DOFA
from pipeline.data import image_store
from pipeline.errors import UserError
from tests.errors import raises

BASE = "dofa_base_patch16_224"


@pytest.fixture(scope="module")
def official():
    """torchgeo's network, with position embeddings that are not zero."""
    torch.manual_seed(3)
    network = torchgeo_dofa.dofa_base_patch16_224().eval()
    torch.nn.init.normal_(network.pos_embed, std=0.02)
    return network


@pytest.fixture
def weights_dir(official, tmp_path):
    """A folder with the network's file, as published: without the classifier and its normalisation."""
    tensors = {k: v for k, v in official.state_dict().items() if not k.startswith(("fc_norm.", "head."))}
    torch.save(tensors, tmp_path / DOFA[BASE].weights_file)
    return tmp_path


@pytest.fixture
def images(images_path):
    return image_store.open_images(images_path("sample-landuse-seg"))


@pytest.fixture
def dofa_encoder(images, weights_dir, make_encoder):
    def make(size=224, **changes):
        return make_encoder(images, "dofa", BASE, size, weights_dir, normalisation="dataset", **changes)

    return make


def test_dofa_features_equal_torchgeos_at_the_bands_wavelengths(official, images, dofa_encoder):
    encoder = dofa_encoder(bands=("B11", "B02", "B8A"))
    image = images.image[:2].values
    features = encoder(image)
    with torch.inference_mode():
        expected = official.forward_features(encoder.prepare(image), [1.614, 0.492, 0.865])
        normalised = official.fc_norm(torch.from_numpy(features.pooled["mean_level3"]))
    np.testing.assert_allclose(normalised, expected, rtol=1e-3, atol=1e-3)
    assert features.levels[0].shape == (2, 768, 14, 14)
    assert "cls_level3" in features.pooled


def test_dofa_features_do_not_depend_on_the_order_of_bands(images, dofa_encoder):
    image = images.image[:1].values
    a, b = (dofa_encoder(bands=bands)(image).levels[3] for bands in (("B02", "B11"), ("B11", "B02")))
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_dofa_features_change_with_wrong_wavelengths(images, dofa_encoder):
    encoder, image = dofa_encoder(bands=("B02", "B11")), images.image[:1].values
    expected = encoder(image).levels[3]
    encoder.network.wrapper.wavelengths = [1.614, 0.492]
    assert np.abs(encoder(image).levels[3] - expected).max() > 1e-3


def test_dofa_wavelengths_stay_in_float32_under_autocast(images, dofa_encoder):
    encoder = dofa_encoder()
    embed, batch = encoder.network.wrapper.dofa_model.patch_embed, encoder.prepare(images.image[:1].values)
    wavelengths = torch.tensor(encoder.network.wrapper.wavelengths)
    with torch.inference_mode():
        expected = embed(batch, wavelengths)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(embed(batch, wavelengths)[0], expected)


def test_dofa_at_another_size_resizes_the_position_embedding(official, images, dofa_encoder):
    encoder = dofa_encoder(size=64, bands=("B02",))
    pos_embed = encoder.network.wrapper.dofa_model.pos_embed
    assert pos_embed.shape == (1, 17, 768)
    assert torch.equal(pos_embed[:, 0], official.pos_embed[:, 0])
    assert encoder(images.image[:1].values).levels[3].shape == (1, 768, 4, 4)


@pytest.mark.parametrize(
    ("variant", "weights"), [(BASE, DOFABase16_Weights), ("dofa_large_patch16_224", DOFALarge16_Weights)]
)
def test_dofa_catalog_names_torchgeos_files(variant, weights):
    file = DOFA[variant].weights
    assert weights.DOFA_MAE.url == f"https://hf.co/{file.repo}/resolve/{file.revision}/{file.file}"


def test_dofa_checkpoint_without_a_tensor_names_it(weights_dir, dofa_encoder):
    path, name = weights_dir / DOFA[BASE].weights_file, "patch_embed.weight_generator.bias_token"
    tensors = torch.load(path, weights_only=True)
    del tensors[name]
    torch.save(tensors, path)
    with raises(UserError, name, path=path, value=[name]):
        dofa_encoder()


def test_dofa_with_a_band_without_wavelength_is_refused(images, make_encoder):
    images = images.copy()
    images["wavelength"] = images.wavelength.copy(data=[*images.wavelength.values[:-1], np.nan])
    with raises(UserError, "swir22", key="bands", value="swir22"):
        make_encoder(images, "dofa", "dofa_small_patch16_224", normalisation="dataset", bands=("B02", "B12"))
