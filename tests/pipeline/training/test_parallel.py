"""Steps that read all changing values from device memory, here run kernel by kernel."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from pipeline.heads.linear import StackedLinear
from pipeline.tasks import Classification
from pipeline.training import loop
from pipeline.training.feature_loader import SplitData
from pipeline.training.loop import HeadTrainer, TrainSchedule
from pipeline.training.parallel import GraphedStep
from tests.pipeline.training.test_loop import HPARAMS, fit_linear, fit_upernet, head_weights


@pytest.fixture
def use_graphed_steps(monkeypatch):
    """Function after whose call `fit` trains by `GraphedStep`, without recording a graph."""
    monkeypatch.setattr(GraphedStep, "__call__", GraphedStep.run_eagerly)

    def train_in_memory(trainer, data, schedule, validation):
        list(loop._run_graphed(trainer, loop._graphed_step(trainer, data, schedule, None), validation))

    return lambda: monkeypatch.setattr(loop, "_train_in_memory", train_in_memory)


def assert_near(actual, expected):
    for head in range(len(HPARAMS)):
        difference = head_weights(actual, head) - head_weights(expected, head)
        assert difference.norm() / head_weights(expected, head).norm() < 1e-3


@pytest.mark.parametrize("head", ["own order", "one order", "dense"])
def test_graphed_steps_equal_plain_steps(use_graphed_steps, points, maps, head):
    if head == "dense":
        fit = partial(fit_upernet, *maps, HPARAMS)
    else:
        hparams = [replace(hparams, seed=5) if head == "one order" else hparams for hparams in HPARAMS]
        fit = partial(fit_linear, *points, hparams)
    plain = fit()
    use_graphed_steps()
    assert_near(fit(), plain)


@pytest.mark.parametrize("head", ["linear", "dense"])
def test_graphed_steps_with_patience_stop_at_the_same_step(use_graphed_steps, monkeypatch, points, maps, head):
    """Validation labels are random, or inverted: some head soon gets worse."""
    stopped_at = []

    class RecordingTrainer(HeadTrainer):
        def restore_best(self):
            stopped_at.append(self.steps)
            super().restore_best()

    monkeypatch.setattr(loop, "HeadTrainer", RecordingTrainer)
    if head == "linear":
        inputs, label = points
        noise = SplitData(inputs, label[torch.randperm(len(label), generator=torch.Generator().manual_seed(1))])
        task, schedule = Classification(3), TrainSchedule(200, 32, patience=1, val_checks=20)
        make_group = partial(StackedLinear, [12], 3)
        fit = partial(loop.fit, make_group, SplitData(*points), task, HPARAMS, schedule, noise)
    else:
        noise = SplitData([level[:6] for level in maps[0]], 1 - maps[1][:6].clamp(max=1))
        fit = partial(fit_upernet, *maps, HPARAMS, steps=30, patience=1, validation=noise)

    plain = fit()
    use_graphed_steps()
    graphed = fit()
    steps = stopped_at[: len(stopped_at) // 2]
    assert min(steps) < (200 if head == "linear" else 30)
    assert stopped_at[len(stopped_at) // 2 :] == steps
    assert_near(graphed, plain)
    assert all(parameter.grad is None for parameter in graphed.parameters())


def test_graphed_step_reads_the_next_rows_and_learning_rate():
    calls = []
    orders = torch.arange(24).view(4, 2, 3)
    step = GraphedStep(
        lambda index, lr_factor: calls.append((index.tolist(), lr_factor.item())), orders, [0.1, 0.2, 0.3, 0.4]
    )
    for _ in range(4):
        step.run_eagerly()
    assert [index for index, _ in calls] == orders.tolist()
    assert [lr_factor for _, lr_factor in calls] == pytest.approx([0.1, 0.2, 0.3, 0.4])
