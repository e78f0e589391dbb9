"""Heads on a GPU: the processor's numbers, and a head's own numbers among others."""

import numpy as np
import pytest
import torch

from pipeline import metrics
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
