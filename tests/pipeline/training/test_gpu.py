"""Heads on a GPU: the processor's numbers, and a head's own numbers among others."""

from functools import partial

import numpy as np
import pytest
import torch

from pipeline import metrics
from pipeline.heads.dense import DenseGroup
from pipeline.heads.linear import LinearGroup
from pipeline.heads.upernet import UperNet
from pipeline.training import fit
from pipeline.training.fit import Data
from tests.pipeline.training.test_fit import SETTINGS, linear, upernet, weights


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
    validation = Data([level.cuda() for level in levels], label.cuda())
    group = groups("upernet", SETTINGS, steps=60, patience=2, validation=validation)
    counts = fit.evaluate(group, validation, fit.Task("segmentation", 2, ignore=255), 8)
    assert metrics.score("segmentation", counts.sum(1), 2).max() > 0.7


def test_dense_heads_in_bfloat16(groups):
    lower = weights(groups("upernet", SETTINGS, steps=10, precision="bfloat16"), 0)
    exact = weights(groups("upernet", SETTINGS, steps=10), 0)
    assert np.isfinite(lower.cpu()).all()
    assert 0 < torch.linalg.norm(lower - exact) / torch.linalg.norm(exact) < 0.2


def test_linear_heads_that_stop_are_the_processors(gpu, points):
    """One that stops changes the recorded step."""

    def train(device: str) -> torch.nn.Module:
        data = Data(*(one.to(device) for one in points))
        recipe = fit.Recipe(60, batch=32, patience=2)
        make = partial(LinearGroup, [points[0].shape[1]], 3)
        return fit.fit(make, data, fit.Task("classification", 3), SETTINGS, recipe, data)

    ours, theirs = train(gpu), train("cpu")
    for place in range(len(SETTINGS)):
        apart = (weights(ours, place).cpu() - weights(theirs, place)).norm() / weights(theirs, place).norm()
        assert apart < 0.03


def test_class_weights_on_a_gpu(gpu, maps):
    levels, label = [level.to(gpu) for level in maps[0]], maps[1].to(gpu)
    task = fit.Task("segmentation", 2, ignore=255, weights=(1.0, 2.0))
    group = fit.fit(
        lambda seeds: DenseGroup(lambda: UperNet([4] * 4, 8, 2), (32, 32), seeds),
        Data(levels, label), task, SETTINGS, fit.Recipe(10, batch=4),
    )  # fmt: skip
    assert all(torch.isfinite(weights(group, place)).all() for place in range(len(SETTINGS)))
