"""DOFA as terratorch builds it, against torchgeo itself and a file with the official layout."""

import numpy as np
import pytest
import torch
from terratorch.models.backbones.dofa_vit import waves_list
from torchgeo.models import DOFABase16_Weights, DOFALarge16_Weights
from torchgeo.models import dofa as torchgeo_dofa

from pipeline.backbones.catalog import DOFA
from pipeline.bands import SENTINEL2
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


def test_dofa_features_equal_torchgeos_at_the_wavelengths_of_pretraining(official, images, dofa_encoder):
    encoder, image = dofa_encoder(bands=("B11", "B02", "B8A")), images.image[:2].values
    features = encoder(image)
    with torch.inference_mode():
        expected = official.forward_features(encoder.prepare(image), [1.61, 0.49, 0.865])
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


def test_dofa_untrained_has_the_sin_cos_positions_of_pretraining(images, make_encoder):
    """Half of the channels are of the column, half of the row; sines come first."""
    encoder = make_encoder(images, "dofa", SMALL, 64, normalisation="dataset", bands=("B02",))
    pos_embed = encoder.network.network.dofa_model.pos_embed[0].numpy()
    assert pos_embed.shape == (17, 384)
    assert not pos_embed[0].any()
    row, column = 1, 3
    angles = [position / 10000 ** (np.arange(96) / 96) for position in (column, row)]
    expected = np.concatenate([function(angle) for angle in angles for function in (np.sin, np.cos)])
    np.testing.assert_allclose(pos_embed[1 + 4 * row + column], expected, atol=1e-5)


def test_dofa_table_of_terratorch_equals_terratorchs():
    keys = ("COASTAL_AEROSOL", "BLUE", "GREEN", "RED", "RED_EDGE_1", "RED_EDGE_2", "RED_EDGE_3", "NIR_BROAD",
            "NIR_NARROW", "WATER_VAPOR", "CIRRUS", "SWIR_1", "SWIR_2")  # fmt: skip
    table = DOFA[SMALL].wavelengths["terratorch"]
    assert table == {band.common_name: waves_list[key] for band, key in zip(SENTINEL2, keys, strict=True)}


def test_dofa_wavelength_codes_of_nearby_wavelengths_differ():
    """The table of docs/decisions/foundation-inputs.md."""
    tables, own = DOFA[SMALL].wavelengths, {band.common_name: band.wavelength for band in SENTINEL2}

    def cosines(table):
        pairs = [(1000 * wavelength, 1000 * table[name]) for name, wavelength in tables["sentinel2"].items()]
        codes = torchgeo_dofa.position_embedding(128, torch.tensor(pairs)).unflatten(0, (-1, 2))
        return torch.cosine_similarity(codes[:, 0], codes[:, 1]).tolist()

    assert cosines(own) == pytest.approx([1, 1, 0.90, 0.97, 0.97, 1, 0.69, 0.76, 0.66], abs=0.006)
    assert cosines(tables["terratorch"]) == pytest.approx([1] * 6 + [0.67, 1, 0.67], abs=0.006)


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
        make_encoder(images, "dofa", SMALL, normalisation="dataset", bands=("B02", "B12"), wavelengths="image")
