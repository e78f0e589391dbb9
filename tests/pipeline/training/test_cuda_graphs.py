"""Steps that read all that changes from the device's memory: what a GPU records, launched here kernel by kernel."""

from functools import partial

import pytest
import torch

from pipeline.heads.linear import StackedLinear
from pipeline.tasks import Classification
from pipeline.training import loop
from pipeline.training.cuda_graphs import GraphedStep
from pipeline.training.feature_loader import SplitData
from pipeline.training.head_trainer import HeadTrainer, HParams, TrainSchedule
from tests.pipeline.training.test_loop import SETTINGS, linear, upernet, weights


@pytest.fixture
def unrecorded(monkeypatch):
    """Train as a GPU does, but for recording."""
    monkeypatch.setattr(GraphedStep, "__call__", GraphedStep.once)

    def in_memory(lane, data, recipe, validation):
        list(loop._repeated(lane, loop._steps(lane, data, recipe, None), validation))

    return lambda: monkeypatch.setattr(loop, "_in_memory", in_memory)


@pytest.mark.parametrize("seeds", [(0, 1, 2), (5, 5, 5)])
def test_linear_heads_are_those_of_plain_steps(unrecorded, points, seeds):
    settings = [
        HParams(one.learning_rate, one.weight_decay, seed) for one, seed in zip(SETTINGS, seeds, strict=True)
    ]
    plain = linear(*points, settings)
    unrecorded()
    ours = linear(*points, settings)
    for head in range(3):
        torch.testing.assert_close(weights(ours, head), weights(plain, head), rtol=1e-4, atol=1e-6)


def test_dense_heads_are_those_of_plain_steps(unrecorded, maps):
    plain = upernet(*maps, SETTINGS)[0]
    unrecorded()
    ours = upernet(*maps, SETTINGS)[0]
    for head in range(3):
        apart = (weights(ours, head) - weights(plain, head)).norm() / weights(plain, head).norm()
        assert apart < 1e-3


@pytest.mark.parametrize("kind", ["linear", "dense"])
def test_heads_that_stop_stop_at_the_same_step(unrecorded, monkeypatch, points, maps, kind):
    """On validation labels that are noise, which some head soon gets worse at."""
    ended = []

    class Watched(HeadTrainer):
        def restore(self):
            ended.append(self.steps)
            super().restore()

    monkeypatch.setattr(loop, "Lane", Watched)
    chance = torch.Generator().manual_seed(1)
    if kind == "linear":
        inputs, label = points
        noise = SplitData(inputs, label[torch.randperm(len(label), generator=chance)])
        task, recipe = Classification(3), TrainSchedule(200, 32, patience=1, val_checks=20)
        train = partial(loop.fit, partial(StackedLinear, [12], 3), SplitData(*points), task, SETTINGS, recipe, noise)
    else:
        noise = SplitData([level[:6] for level in maps[0]], 1 - maps[1][:6].clamp(max=1))

        def train():
            return upernet(*maps, SETTINGS, steps=60, patience=1, validation=noise)[0]

    plain = train()
    unrecorded()
    ours = train()
    steps = ended[: len(ended) // 2]
    assert min(steps) < (200 if kind == "linear" else 60)
    assert ended[len(ended) // 2 :] == steps
    for head in range(3):
        apart = (weights(ours, head) - weights(plain, head)).norm() / weights(plain, head).norm()
        assert apart < 1e-3
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_a_step_reads_the_next_rows_and_the_next_rate():
    seen = []
    orders = torch.arange(24).view(4, 2, 3)
    steps = GraphedStep(
        lambda index, factor: seen.append((index.tolist(), factor.item())), orders, [0.1, 0.2, 0.3, 0.4]
    )
    for _ in range(4):
        steps.once()
    assert [index for index, _ in seen] == orders.tolist()
    assert [factor for _, factor in seen] == pytest.approx([0.1, 0.2, 0.3, 0.4])
