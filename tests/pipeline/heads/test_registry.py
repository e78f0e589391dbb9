"""Heads and fusions from outside the package; tests/test_adding.py trains them from raw data."""

import dataclasses
from pathlib import Path

import pytest
import torch

from pipeline import heads
from pipeline.config import CustomHeadConfig, HeadsConfig, LinearHeadConfig, UPerNetHeadConfig
from pipeline.errors import UserError
from pipeline.heads import HeadType, checkpoint, fusion, get_head
from pipeline.heads.config import HeadConfig
from pipeline.heads.fusion import Fusion
from pipeline.training import task_data
from pipeline.training.protocol import train_and_test, trained_head
from tests.errors import raises

SETTINGS = {"two_layer": CustomHeadConfig(steps=60, batch=8, options={"hidden": 5})}


class TwoLayerHead(torch.nn.Sequential):
    """Two 1x1 convolutions on the finest level."""

    def __init__(self, channels, n_classes, hidden=8):
        super().__init__(
            torch.nn.Conv2d(channels[0], hidden, 1), torch.nn.ReLU(), torch.nn.Conv2d(hidden, n_classes, 1)
        )

    def forward(self, levels):
        return super().forward(levels[0])


class MaxFusion(Fusion):
    """Maximum over the backbones."""

    def fuse(self, first, projected, dim):
        return torch.stack([first, *projected]).amax(dim=0)


@pytest.fixture
def load_masks(monkeypatch, informative_masks):
    """Function from settings of custom heads to the data of a registered one."""
    monkeypatch.setitem(heads.HEADS, "two_layer", HeadType(f"{__name__}:TwoLayerHead"))
    stores, images = informative_masks
    base = HeadsConfig(LinearHeadConfig("all", "mean", 20, 20), UPerNetHeadConfig(4, 4, 4))
    paths = {stores[name].location: None for name in ("fine", "coarse")}

    def load(custom):
        config = dataclasses.replace(base, segmentation="two_layer", custom=custom)
        return task_data.load(paths, Path(images.encoding["source"]), config, ("train", "val", "test"), "cpu")

    return load


def test_head_by_its_modules_name_trains_and_loads(load_masks, tmp_path):
    data = load_masks(SETTINGS)
    result = train_and_test(data, {"learning_rate": 0.03, "weight_decay": 0.01}, 2, {})
    assert set(result.runs["head"]) == {"two_layer, hidden 5, concat, level0, level1"}
    assert result.runs.score.max() > 0.5
    checkpoint.save(tmp_path / "head.pt", trained_head(data, "fine+coarse", result.group, 0))
    assert checkpoint.load(tmp_path / "head.pt").config == data.head_config


def test_load_with_a_head_that_has_no_settings_is_refused(load_masks):
    with raises(UserError, "two_layer", key="heads.custom.two_layer"):
        load_masks({})


def test_linear_heads_with_a_fusion_from_outside_have_its_logits(monkeypatch):
    monkeypatch.setitem(fusion.FUSIONS, "max", MaxFusion)
    group, inputs = HeadConfig("linear", "max", (((4,),), ((3,),)), 2).create_group((0, 1)), torch.randn(9, 7)
    ((_, logits),) = group.forward_heads(inputs, None)
    linear = torch.nn.functional.linear
    for head in (0, 1):
        projected = linear(inputs[:, 4:], group.weights[0][head], group.biases[0][head])
        expected = linear(inputs[:, :4].maximum(projected), group.weights[1][head], group.biases[1][head])
        torch.testing.assert_close(logits[head], expected)


def test_get_head_of_a_pooled_head_for_masks_is_refused():
    with raises(UserError, "linear", value="linear", allowed=("upernet", "fcn")):
        get_head("linear", is_dense=True)
