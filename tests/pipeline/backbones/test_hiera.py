"""Hiera as SAM 2 builds it, against the whole official model called directly."""

from pathlib import Path

import numpy as np
import pytest
import sam2
import torch
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from sam2.build_sam import build_sam2
from sam2.modeling.backbones import hieradet
from sam2.modeling.backbones.utils import window_partition

from pipeline.backbones.catalog import HIERA
from pipeline.backbones.hiera import padding_shares
from pipeline.errors import UserError
from tests.errors import raises

TINY = "sam2.1_hiera_t"


@pytest.fixture(scope="module")
def official():
    """The whole SAM 2.1 tiny with random weights, built by its own function."""
    GlobalHydra.instance().clear()  # DVC's tests leave theirs
    initialize_config_module(sam2.__name__, version_base="1.2")
    torch.manual_seed(3)
    return build_sam2(f"configs/sam2.1/{TINY}.yaml", device="cpu")


@pytest.fixture
def weights_dir(official, tmp_path):
    """A folder as the fetch stage leaves it, with a file of the official layout."""
    torch.save({"model": official.state_dict()}, tmp_path / HIERA[TINY].weights_file)
    return tmp_path


def test_hiera_levels_equal_the_official_image_encoders(official, weights_dir, images, make_encoder):
    encoder = make_encoder(images, "hiera", TINY, 96, weights_dir)
    image = images.image[:2].values
    with torch.inference_mode():
        expected = official.image_encoder.trunk(encoder.prepare(image))
    features = encoder(image)
    assert [level.shape[1:] for level in features.levels] == [(96, 24, 24), (192, 12, 12), (384, 6, 6), (768, 3, 3)]
    for level, expected_level in zip(features.levels, expected, strict=True):
        np.testing.assert_allclose(level, expected_level, rtol=1e-4, atol=1e-4)
    mean = features.levels[3].mean((2, 3))
    np.testing.assert_allclose(features.pooled["mean_level3"], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [224, 320])
def test_padding_shares_equal_the_zero_tokens_that_sam2_adds(official, monkeypatch, size):
    trunk, measured = official.image_encoder.trunk, []

    def partition(tokens, window):
        windows, padded = window_partition(tokens, window)
        measured.append(1 - tokens[..., 0].numel() / windows[..., 0].numel())
        return windows, padded

    monkeypatch.setattr(hieradet, "window_partition", partition)
    with torch.inference_mode():
        trunk(torch.zeros(1, 3, size, size))
    shares, multiple = padding_shares(trunk, size)
    assert [share for block, share in zip(trunk.blocks, shares, strict=True) if block.window_size] == measured
    assert multiple == 224


@pytest.mark.parametrize(("size", "share"), [(224, 0.234), (256, 0), (320, 0.609), (1024, 0)])
def test_padding_shares_of_the_large_variant(size, share):
    trunk = hieradet.Hiera(  # as configs/sam2.1/sam2.1_hiera_l.yaml, but narrow
        embed_dim=8, num_heads=2, stages=(2, 6, 36, 4), global_att_blocks=(23, 33, 43), window_spec=(8, 4, 16, 8)
    )
    shares, multiple = padding_shares(trunk, size)
    assert max(shares) == pytest.approx(share, abs=5e-4)
    assert multiple == 256


@pytest.mark.parametrize("size", [224, 256])
def test_hiera_at_a_size_that_windows_do_not_divide_prints_the_share(images, make_encoder, capsys, size):
    make_encoder(images, "hiera", TINY, size)
    printed = capsys.readouterr().err
    assert ("67%" in printed and "224" in printed) == (size == 256)
    assert bool(printed) == (size == 256)


@pytest.mark.parametrize("variant", list(HIERA))
def test_hiera_variants_have_configurations_of_four_stages(variant):
    config = OmegaConf.load(Path(sam2.__file__).parent / f"configs/sam2.1/{variant}.yaml")
    assert len(config.model.image_encoder.trunk.get("stages", (2, 3, 16, 3))) == 4
    assert variant.rpartition("_")[2][0] == HIERA[variant].weights.repo.rpartition("-hiera-")[2][0]


@pytest.mark.parametrize(
    ("name", "mention"), [("sam_mask_decoder.x", "image_encoder.trunk."), ("image_encoder.trunk.x", "pos_embed")]
)
def test_hiera_checkpoint_of_another_layout_is_refused_by_name(name, mention, tmp_path, images, make_encoder):
    path = tmp_path / HIERA[TINY].weights_file
    torch.save({"model": {name: torch.zeros(1)}}, path)
    with raises(UserError, mention, path=path):
        make_encoder(images, "hiera", TINY, 96, tmp_path)
