"""Heads on a GPU: the processor's numbers, and a head's own numbers among others."""

from functools import partial

import numpy as np
import pytest
import torch

from pipeline.heads.dense import HeadList
from pipeline.heads.linear import StackedLinear
from pipeline.heads.upernet import UPerNet
from pipeline.tasks import Classification, Segmentation
from pipeline.training import loop
from pipeline.training.evaluate import evaluate
from pipeline.training.feature_loader import SplitData
from pipeline.training.head_trainer import TrainSchedule
from tests.pipeline.training.test_loop import SETTINGS, linear, upernet, weights


@pytest.fixture
def groups(gpu, points, maps):
    """From a kind of head, settings and a device to trained heads."""

    def train(kind: str, settings, device: str = gpu, **more):
        if kind == "linear":
            return linear(*(one.to(device) for one in points), settings, **more)
        levels, label = maps
        return upernet([level.to(device) for level in levels], label.to(device), settings, **more)[0]

    return train


@pytest.mark.parametrize("kind", ["linear", "upernet"])
def test_a_gpu_trains_the_processors_heads(groups, kind):
    both = [groups(kind, SETTINGS, device, steps=10) for device in ("cpu", "cuda")]
    for place in range(len(SETTINGS)):
        ours, theirs = (weights(group, place).cpu() for group in both)
        assert (ours - theirs).norm() / ours.norm() < 0.03


@pytest.mark.parametrize("kind", ["linear", "upernet"])
def test_a_head_among_others_is_the_head_alone(groups, kind):
    among = groups(kind, SETTINGS, steps=10)
    for place, setting in enumerate(SETTINGS):
        alone = weights(groups(kind, [setting], steps=10), 0)
        assert (alone - weights(among, place)).norm() / alone.norm() < (1e-4 if kind == "linear" else 1e-7)


def test_patience_on_a_gpu(groups, maps):
    levels, label = maps
    validation = SplitData([level.cuda() for level in levels], label.cuda())
    group = groups("upernet", SETTINGS, steps=60, patience=2, validation=validation)
    counts = evaluate(group, validation, Segmentation(2), 8)
    assert Segmentation(2).score(counts.sum(1)).max() > 0.7


def test_dense_heads_in_bfloat16(groups):
    lower = weights(groups("upernet", SETTINGS, steps=10, precision="bfloat16"), 0)
    exact = weights(groups("upernet", SETTINGS, steps=10), 0)
    assert np.isfinite(lower.cpu()).all()
    assert 0 < torch.linalg.norm(lower - exact) / torch.linalg.norm(exact) < 0.2


def test_linear_heads_that_stop_are_the_processors(gpu, points):
    """On validation labels that are noise."""

    def train(device: str) -> torch.nn.Module:
        inputs, label = points
        noise = label[torch.randperm(len(label), generator=torch.Generator().manual_seed(1))]
        data, validation = (SplitData(inputs.to(device), one.to(device)) for one in (label, noise))
        recipe = TrainSchedule(200, batch=32, patience=1, val_checks=20)
        return loop.fit(
            partial(StackedLinear, [12], 3), data, Classification(3), SETTINGS, recipe, validation
        )

    ours, theirs = train(gpu), train("cpu")
    for place in range(len(SETTINGS)):
        apart = (weights(ours, place).cpu() - weights(theirs, place)).norm() / weights(theirs, place).norm()
        assert apart < 0.03
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_class_weights_are_the_processors(gpu, maps):
    def train(device: str) -> torch.nn.Module:
        task = Segmentation(2, (1.0, 20.0))
        data = SplitData([level.to(device) for level in maps[0]], maps[1].to(device))
        make = partial(HeadList, lambda: UPerNet([4] * 4, 2, 8), (32, 32))
        return loop.fit(make, data, task, SETTINGS, TrainSchedule(10, batch=4))

    ours, theirs = train(gpu), train("cpu")
    for place in range(len(SETTINGS)):
        apart = (weights(ours, place).cpu() - weights(theirs, place)).norm() / weights(theirs, place).norm()
        assert apart < 0.03


def test_memory_of_recordings_is_given_back(groups):
    groups("upernet", SETTINGS, steps=10)
    held = torch.cuda.memory_reserved()
    for _ in range(3):
        groups("upernet", SETTINGS, steps=10)
    assert torch.cuda.memory_reserved() <= held
