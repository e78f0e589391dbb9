"""A head and a fusion from outside the package, used by name."""

import dataclasses
from pathlib import Path

import pytest
import torch

from pipeline import heads
from pipeline.config import CustomHeadConfig, HeadsConfig, LinearHeadConfig, UPerNetHeadConfig
from pipeline.errors import UserError
from pipeline.heads import checkpoint, fusion, get_head, register_head
from pipeline.heads.fusion import Fusion, register_fusion
from pipeline.training import task_data
from pipeline.training.loop import HParams
from pipeline.training.protocol import train_and_test, train_heads, trained_head
from tests.errors import raises

CONFIG = HeadsConfig(
    LinearHeadConfig("all", "mean", steps=20, batch=20), UPerNetHeadConfig(channels=4, steps=4, batch=4)
)
BEST = {"learning_rate": 0.03, "weight_decay": 0.01}


class TwoLayerHead(torch.nn.Module):
    """Two 1x1 convolutions on the finest level."""

    def __init__(self, channels, n_classes, hidden=8):
        super().__init__()
        layers = torch.nn.Conv2d(channels[0], hidden, 1), torch.nn.ReLU(), torch.nn.Conv2d(hidden, n_classes, 1)
        self.layers = torch.nn.Sequential(*layers)

    def forward(self, levels):
        return self.layers(levels[0])


class MaxFusion(Fusion):
    """Maximum over the backbones."""

    def fuse(self, first, projected, dim):
        return torch.stack([first, *projected]).amax(dim=0)


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """Restore the registries after each test."""
    monkeypatch.setattr(heads, "HEADS", dict(heads.HEADS))
    monkeypatch.setattr(fusion, "FUSIONS", dict(fusion.FUSIONS))


def load(stores_and_images, names, **changes):
    stores, images = stores_and_images
    locations = {stores[name].location: None for name in names}
    config = dataclasses.replace(CONFIG, **changes)
    return task_data.load(locations, Path(images.encoding["source"]), config, ("train", "val", "test"), "cpu")


@pytest.mark.parametrize("factory", [TwoLayerHead, f"{__name__}:TwoLayerHead"], ids=["class", "module:class"])
def test_register_head_makes_a_head_that_trains_and_loads(informative_masks, tmp_path, factory):
    register_head("two_layer", factory)
    settings = CustomHeadConfig(steps=200, batch=8, options={"hidden": 5})
    data = load(informative_masks, ["fine", "coarse"], segmentation="two_layer", custom={"two_layer": settings})
    assert data.head_config.options == {"hidden": 5}
    result = train_and_test(data, BEST, 2, {})
    assert set(result.runs["head"]) == {"two_layer, hidden 5, concat, level0, level1"}
    assert result.runs.score.max() > 0.5
    checkpoint.save(tmp_path / "head.pt", trained_head(data, "fine+coarse", result.group, 0))
    assert checkpoint.load(tmp_path / "head.pt").config == data.head_config


@pytest.mark.parametrize("task", ["chips", "masks"])
def test_register_fusion_makes_a_fusion_that_trains(informative_chips, informative_masks, task):
    register_fusion("max", MaxFusion)
    data = (
        load(informative_chips, ["high", "low"], fusion="max")
        if task == "chips"
        else load(informative_masks, ["fine", "coarse"], fusion="max")
    )
    group = train_heads(data, [HParams(1e-2, 1e-3, 0)])
    assert all(value.isfinite().all() for value in group.state_dict().values())


def test_register_of_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="upernet"):
        register_head("upernet", TwoLayerHead)
    with pytest.raises(ValueError, match="concat"):
        register_fusion("concat", MaxFusion)


def test_get_head_of_an_unknown_name_is_refused():
    with raises(UserError, "unet", key="heads.segmentation", value="unet", allowed=("upernet", "fcn")):
        get_head("unet", is_dense=True)
    with raises(UserError, "linear", value="linear", allowed=("upernet", "fcn")):
        get_head("linear", is_dense=True)


def test_load_with_a_head_that_has_no_settings_is_refused(informative_masks):
    register_head("two_layer", TwoLayerHead)
    with raises(UserError, "two_layer", key="heads.custom.two_layer"):
        load(informative_masks, ["fine"], segmentation="two_layer")
