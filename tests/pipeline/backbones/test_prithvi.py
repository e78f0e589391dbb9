"""Prithvi as terratorch builds it, against terratorch called directly and files laid out as the official ones are."""

import numpy as np
import pytest
import torch

from pipeline.backbones import prithvi
from pipeline.data import image_store
from pipeline.errors import UserError

TINY = "prithvi_eo_v2_tiny_tl"


@pytest.fixture(scope="module")
def official():
    """The masked autoencoder with four frames, as it is published: encoder and decoder."""
    from terratorch.models.backbones.prithvi_vit import _create_prithvi

    torch.manual_seed(3)
    return _create_prithvi(TINY, num_frames=4, encoder_only=False)


@pytest.fixture
def folder(official, tmp_path):
    torch.save(official.state_dict(), tmp_path / prithvi.VARIANTS[TINY].weights_file)
    return tmp_path


@pytest.fixture
def images(images_path):
    return image_store.open_images(images_path("sample-landuse-seg"))


def directly(folder, image, bands=None, **coordinates):
    """terratorch's own way to a pyramid from the same file."""
    from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY

    network = TERRATORCH_BACKBONE_REGISTRY.build(
        TINY,
        pretrained=True,
        ckpt_path=str(folder / prithvi.VARIANTS[TINY].weights_file),
        bands=bands,
        num_frames=1,
    )
    with torch.inference_mode():
        outputs = network.eval()(image, **coordinates)
        return network.prepare_features_for_image_model([outputs[index] for index in prithvi.OUTPUTS[TINY]])


def test_levels_are_those_of_terratorch_with_place_and_time(folder, images, make_encoder):
    sealed = make_encoder(images, "prithvi", TINY, 224, folder)
    image, known = images.image[:2].values, sealed.inputs.where_and_when(images, slice(0, 2))
    ours = sealed(image, known)
    theirs = directly(
        folder,
        sealed.prepare(image),
        temporal_coords=torch.from_numpy(known["time"]),
        location_coords=torch.from_numpy(known["place"]),
    )
    assert ours.levels[0].shape == (2, 192, 14, 14)
    for level, other in zip(ours.levels, theirs, strict=True):
        np.testing.assert_allclose(level, other, rtol=1e-4, atol=1e-4)
    nowhere = sealed(image, {})
    assert np.abs(nowhere.levels[3] - ours.levels[3]).max() > 1e-3
    assert list(ours.pooled) == [f"{kind}_level{i}" for kind in ("mean", "cls") for i in range(4)]


def test_fewer_bands_take_the_columns_that_belong_to_them(folder, official, images, make_encoder):
    from terratorch.datasets import HLSBands

    sealed = make_encoder(images, "prithvi", TINY, 224, folder, bands=("red", "nir", "swir16"))
    image = images.image[:1].values
    theirs = directly(folder, sealed.prepare(image), [HLSBands.RED, HLSBands.NIR_NARROW, HLSBands.SWIR_1])
    np.testing.assert_allclose(sealed(image).levels[3], theirs[3], rtol=1e-4, atol=1e-4)
    columns = official.state_dict()["encoder.patch_embed.proj.weight"][:, [2, 3, 4]]
    assert torch.equal(sealed.network.network.patch_embed.proj.weight, columns)


def test_years_and_days_survive_lower_precision(folder, images, make_encoder):
    """In bfloat16 the year 2017 would be 2016, and so would the embedding."""
    sealed = make_encoder(images, "prithvi", TINY, 224, folder)
    embed = sealed.network.network.temporal_embed_enc
    when = torch.tensor([[[2017.0, 46.0]]])
    with torch.inference_mode():
        exact = embed(when)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(embed(when), exact)
    assert not torch.allclose(embed(torch.tensor([[[2016.0, 46.0]]])), exact, atol=1e-3)


def test_the_600m_has_a_finer_grid_and_the_layers_are_quarters():
    from terratorch.models.backbones.prithvi_vit import prithvi_cfgs

    for variant, outputs in prithvi.OUTPUTS.items():
        depth, patch = prithvi_cfgs[variant]["depth"], prithvi_cfgs[variant]["patch_size"][1]
        assert outputs == tuple(depth // 4 * quarter - 1 for quarter in (1, 2, 3, 4))
        assert prithvi.VARIANTS[variant].strides == (patch,) * 4
        assert prithvi_cfgs[variant]["bands"] == prithvi_cfgs[TINY]["bands"]


def test_the_files_are_those_that_terratorch_names():
    from terratorch.models.backbones.prithvi_vit import pretrained_weights

    for variant, declared in prithvi.VARIANTS.items():
        theirs = pretrained_weights[variant]
        assert (declared.weights.repo, declared.weights.file) == (theirs["hf_hub_id"], theirs["hf_hub_filename"])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: {"decoder.x": torch.zeros(1)}, "holds no tensors named encoder"),
        (
            lambda file: {k: v for k, v in file.items() if k != "encoder.blocks.3.norm1.bias"},
            "missing blocks.3.norm1",
        ),
        (lambda file: {**file, "encoder.blocks.99.w": torch.zeros(1)}, "unexpected blocks.99.w"),
        (lambda file: {**file, "encoder.norm.bias": torch.zeros(3)}, "size mismatch for norm.bias"),
    ],
)
def test_another_layout_is_refused_by_name(spoil, words, folder, images, make_encoder):
    path = folder / prithvi.VARIANTS[TINY].weights_file
    torch.save(spoil(torch.load(path, weights_only=True)), path)
    with pytest.raises(UserError, match=words):
        make_encoder(images, "prithvi", TINY, 224, folder)
