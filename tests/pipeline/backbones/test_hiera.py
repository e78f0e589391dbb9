"""Hiera as SAM 2 builds it, against the whole official model called directly."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.backbones import hiera
from pipeline.data import image_store
from pipeline.errors import UserError

TINY = "sam2.1_hiera_t"


@pytest.fixture(scope="module")
def official():
    """The whole SAM 2.1 tiny with weights of its own, built by its own function."""
    import sam2
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from sam2.build_sam import build_sam2

    GlobalHydra.instance().clear()  # DVC's tests leave their own behind
    initialize_config_module(sam2.__name__, version_base="1.2")
    torch.manual_seed(3)
    return build_sam2(f"configs/sam2.1/{TINY}.yaml", device="cpu")


@pytest.fixture
def folder(official, tmp_path):
    """Where the fetch stage would leave its file, laid out as the official one is."""
    torch.save({"model": official.state_dict()}, tmp_path / hiera.VARIANTS[TINY].weights_file)
    return tmp_path


@pytest.fixture
def images(images_path):
    return image_store.open_images(images_path("sample-landuse-seg"))


def test_levels_are_those_of_the_official_image_encoder(official, folder, images, make_encoder):
    sealed = make_encoder(images, "hiera", TINY, 96, folder)
    image = images.image[:2].values
    with torch.inference_mode():
        trunk = official.image_encoder.trunk(sealed.prepare(image))
    ours = sealed(image)
    assert [level.shape[1:] for level in ours.levels] == [(96, 24, 24), (192, 12, 12), (384, 6, 6), (768, 3, 3)]
    for level, theirs in zip(ours.levels, trunk, strict=True):
        np.testing.assert_allclose(level, theirs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours.pooled["mean_level3"], ours.levels[3].mean((2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", list(hiera.VARIANTS))
def test_every_variant_has_a_configuration_of_four_stages(variant):
    import sam2
    from omegaconf import OmegaConf

    described = OmegaConf.load(Path(sam2.__file__).parent / f"configs/sam2.1/{variant}.yaml")
    trunk = described.model.image_encoder.trunk
    assert len(trunk.get("stages", (2, 3, 16, 3))) == 4
    assert variant.rpartition("_")[2][0] == hiera.VARIANTS[variant].weights.repo.rpartition("-hiera-")[2][0]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: {"state": torch.zeros(1)}, "no tensors named image_encoder.trunk.…; it has state"),
        (lambda file: {"model": {"sam_mask_decoder.x": torch.zeros(1)}}, "no tensors named image_encoder.trunk"),
        (
            lambda file: {"model": {k: v for k, v in file["model"].items() if not k.endswith("blocks.3.norm1.bias")}},
            "missing blocks.3.norm1.bias, none unexpected",
        ),
        (
            lambda file: {"model": {**file["model"], "image_encoder.trunk.blocks.99.w": torch.zeros(1)}},
            "none missing, unexpected blocks.99.w",
        ),
        (
            lambda file: {"model": {**file["model"], "image_encoder.trunk.pos_embed": torch.zeros(1)}},
            "size mismatch for pos_embed",
        ),
    ],
)
def test_another_layout_is_refused_by_name(spoil, words, folder, images, make_encoder):
    path = folder / hiera.VARIANTS[TINY].weights_file
    torch.save(spoil(torch.load(path, weights_only=True)), path)
    with pytest.raises(UserError, match=words):
        make_encoder(images, "hiera", TINY, 96, folder)


def test_random_weights_follow_the_seed(images, make_encoder):
    image = images.image[:1].values
    first, again, other = (make_encoder(images, "hiera", TINY, 64, seed=seed)(image).levels[0] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
