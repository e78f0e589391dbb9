"""DOFA as terratorch builds it, against torchgeo called directly and a file laid out as the official one is."""

import numpy as np
import pytest
import torch

from pipeline.backbones import dofa
from pipeline.data import image_store
from pipeline.errors import UserError

BASE = "dofa_base_patch16_224"


@pytest.fixture(scope="module")
def official():
    """torchgeo's network, with position embeddings that are not nought."""
    from torchgeo.models import dofa as torchgeo

    torch.manual_seed(3)
    network = torchgeo.dofa_base_patch16_224().eval()
    torch.nn.init.normal_(network.pos_embed, std=0.02)
    return network


@pytest.fixture
def folder(official, tmp_path):
    """The published file has neither the classifier nor the normalisation before it."""
    tensors = {k: v for k, v in official.state_dict().items() if not k.startswith(("fc_norm.", "head."))}
    torch.save(tensors, tmp_path / dofa.VARIANTS[BASE].weights_file)
    return tmp_path


@pytest.fixture
def images(images_path):
    return image_store.open_images(images_path("sample-landuse-seg"))


@pytest.fixture
def encoder(images, folder, make_encoder):
    def make(size=224, **changes):
        return make_encoder(images, "dofa", BASE, size, folder, normalisation="dataset", **changes)

    return make


def test_features_are_those_of_torchgeo_for_the_bands_wavelengths(official, images, encoder):
    sealed = encoder(bands=("B11", "B02", "B8A"))
    image = images.image[:2].values
    ours = sealed(image)
    with torch.inference_mode():
        normed = official.forward_features(sealed.prepare(image), [1.614, 0.492, 0.865])
        again = official.fc_norm(torch.from_numpy(ours.pooled["mean_level3"]))
    np.testing.assert_allclose(again, normed, rtol=1e-3, atol=1e-3)
    assert ours.levels[0].shape == (2, 768, 14, 14)
    assert "cls_level3" in ours.pooled


def test_the_order_of_bands_does_not_matter_as_long_as_wavelengths_go_with_them(images, encoder):
    image = images.image[:1].values
    one, other = (encoder(bands=bands)(image).levels[3] for bands in (("B02", "B11"), ("B11", "B02")))
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_wrong_wavelengths_show(images, encoder):
    sealed, image = encoder(bands=("B02", "B11")), images.image[:1].values
    right = sealed(image).levels[3]
    sealed.network.wrapper.wavelengths = [1.614, 0.492]
    assert np.abs(sealed(image).levels[3] - right).max() > 1e-3


def test_wavelengths_survive_lower_precision(images, encoder):
    sealed = encoder()
    embed, batch = sealed.network.wrapper.dofa_model.patch_embed, sealed.prepare(images.image[:1].values)
    waves = torch.tensor(sealed.network.wrapper.wavelengths)
    with torch.inference_mode():
        exact = embed(batch, waves)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(embed(batch, waves)[0], exact)


def test_other_sizes_get_the_trained_positions_resized(official, images, encoder):
    sealed = encoder(size=64, bands=("B02",))
    embedded = sealed.network.wrapper.dofa_model.pos_embed
    assert embedded.shape == (1, 17, 768)
    assert torch.equal(embedded[:, 0], official.pos_embed[:, 0])
    assert sealed(images.image[:1].values).levels[3].shape == (1, 768, 4, 4)


def test_the_files_are_those_that_torchgeo_names():
    from torchgeo.models import DOFABase16_Weights, DOFALarge16_Weights

    for variant, theirs in ((BASE, DOFABase16_Weights), ("dofa_large_patch16_224", DOFALarge16_Weights)):
        file = dofa.VARIANTS[variant].weights
        assert theirs.DOFA_MAE.url == f"https://hf.co/{file.repo}/resolve/{file.revision}/{file.file}"


def test_a_missing_tensor_is_named(folder, encoder):
    path = folder / dofa.VARIANTS[BASE].weights_file
    tensors = torch.load(path, weights_only=True)
    del tensors["patch_embed.weight_generator.bias_token"]
    torch.save(tensors, path)
    with pytest.raises(UserError, match="missing patch_embed.weight_generator.bias_token, none unexpected"):
        encoder()
