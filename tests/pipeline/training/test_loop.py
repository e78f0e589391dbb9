"""Training of groups of heads; a CUDA graph's steps are here run kernel by kernel."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from pipeline.heads.dense import HeadList
from pipeline.heads.linear import StackedLinear
from pipeline.heads.upernet import UPerNet
from pipeline.tasks import IGNORE, Classification, MultiLabel, Segmentation
from pipeline.training import loop
from pipeline.training.feature_loader import SplitData
from pipeline.training.loop import HeadTrainer, HParams, TrainSchedule
from pipeline.training.optim import NetworkAdamW, warm_cosine
from pipeline.training.parallel import GraphedStep
from pipeline.training.predictions import evaluate

CLASSIFICATION, SEGMENTATION = Classification(3), Segmentation(2)
HPARAMS = [HParams(1e-2, 1e-4, 0), HParams(1e-3, 1e-1, 1), HParams(3e-2, 1e-6, 2)]


@pytest.fixture
def two_cores():
    """Train on two cores, whatever share of the machine this process has."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def use_graphed_steps(monkeypatch):
    """Function after whose call `fit` trains by `GraphedStep`, without recording a graph."""
    monkeypatch.setattr(GraphedStep, "__call__", GraphedStep.run_eagerly)

    def train_in_memory(trainer, data, validation):
        list(loop._run_graphed(trainer, loop._graphed_step(trainer, data, None), validation))

    return lambda: monkeypatch.setattr(loop, "_train_in_memory", train_in_memory)


def fit_linear(inputs, label, hparams, steps=60, task=CLASSIFICATION, patience=0, **options):
    make_group = partial(StackedLinear, [inputs.shape[1]], task.n_classes)
    schedule = TrainSchedule(steps, batch=32, patience=patience, val_checks=20)
    return loop.fit(make_group, SplitData(inputs, label), task, hparams, schedule, **options)


def fit_upernet(levels, label, hparams, steps=6, precision="float32", patience=0, task=SEGMENTATION, **options):
    def make_group(seeds):
        return HeadList(lambda: UPerNet([4] * 4, 2, 8), (32, 32), seeds, precision)

    schedule = TrainSchedule(steps, batch=4, patience=patience, val_checks=5)
    return loop.fit(make_group, SplitData(levels, label), task, hparams, schedule, **options)


def head_weights(group, head):
    """All parameters of one head as a vector."""
    if group.is_stacked:
        return torch.cat([parameter.detach()[head].flatten() for parameter in group.parameters()])
    return torch.cat([parameter.detach().flatten() for parameter in group.heads[head].parameters()])


def mean_iou(group, data):
    """Score of each head, (head,)."""
    return SEGMENTATION.score(evaluate(group, data, SEGMENTATION, 8).sum(1))


def random_labels(points):
    inputs, label = points
    return SplitData(inputs, label[torch.randperm(len(label), generator=torch.Generator().manual_seed(1))])


@pytest.mark.parametrize("task", [CLASSIFICATION, MultiLabel(2)], ids=lambda task: task.type.value)
def test_fit_of_linear_heads_learns_a_linear_rule(points, task):
    inputs, label = points
    label = (inputs[:, :2] > 0).long() if task.is_multilabel else label
    counts = evaluate(fit_linear(inputs, label, HPARAMS, 200, task), SplitData(inputs, label), task, 64)
    assert counts.shape[:2] == (3, 300)
    assert task.score(counts.sum(1)).max() > 0.95


def test_fit_of_upernet_learns_and_ignores_unlabelled_pixels(maps):
    group = fit_upernet(*maps, [HParams(1e-2, 1e-4, 0)], steps=40)
    counts = evaluate(group, SplitData(*maps), SEGMENTATION, 8)
    assert counts.sum() == (maps[1] != IGNORE).sum()
    assert SEGMENTATION.score(counts.sum(1))[0] > 0.75


def test_fit_in_bfloat16_is_near_float32(maps):
    lower, full = (fit_upernet(*maps, HPARAMS[:1], precision=precision) for precision in ("bfloat16", "float32"))
    assert {parameter.dtype for parameter in lower.parameters()} == {torch.float32}
    lower, full = head_weights(lower, 0), head_weights(full, 0)
    assert 0 < (lower - full).norm() / full.norm() < 0.2


@pytest.mark.usefixtures("two_cores")
def test_fit_of_a_head_among_others_equals_the_head_alone(points, maps):
    together, again = fit_linear(*points, HPARAMS), fit_linear(*points, HPARAMS)
    for head, hparams in enumerate(HPARAMS):
        assert torch.equal(head_weights(together, head), head_weights(again, head))
        alone = fit_linear(*points, [hparams])
        torch.testing.assert_close(head_weights(together, head), head_weights(alone, 0), rtol=1e-4, atol=1e-5)
    together = fit_upernet(*maps, HPARAMS)
    for head, hparams in enumerate(HPARAMS):
        assert torch.equal(head_weights(together, head), head_weights(fit_upernet(*maps, [hparams]), 0))


def test_fit_with_equal_seeds_shares_batches_and_with_others_does_not(points):
    """Shared batches, and each head's own rows, give the same numbers."""
    shared = fit_linear(*points, [HParams(1e-2, 1e-3, 7)] * 2)
    different = fit_linear(*points, [HParams(1e-2, 1e-3, 7), HParams(1e-2, 1e-3, 8)])
    torch.testing.assert_close(head_weights(shared, 0), head_weights(different, 0), rtol=1e-4, atol=1e-5)
    assert (head_weights(different, 0) - head_weights(different, 1)).abs().max() > 0.01


def test_fit_equals_a_loop_of_torchs_adamw_and_cross_entropy(points):
    inputs, label = points
    hparams, steps = HParams(1e-2, 1e-2, 5), 25
    group = fit_linear(inputs, label, [hparams], steps)
    torch.manual_seed(5)
    reference = torch.nn.Linear(12, 3)
    groups = [{"params": [reference.weight], "weight_decay": 1e-2}, {"params": [reference.bias], "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    batches, lr_factor = loop.batch_order(len(label), TrainSchedule(steps, 32), 5), warm_cosine(steps)
    for step in range(steps):
        for parameter_group in optimizer.param_groups:
            parameter_group["lr"] = 1e-2 * lr_factor(step)
        rows = batches[step]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(reference(inputs[rows]), label[rows]).backward()
        optimizer.step()
    torch.testing.assert_close(group.weights[0][0], reference.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(group.biases[0][0], reference.bias, rtol=1e-5, atol=1e-6)


def test_network_adamw_is_exactly_torchs():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 5, 1))
    network.unused = torch.nn.Linear(2, 2)
    reference = copy.deepcopy(network)
    parameters = list(reference.parameters())
    groups = [{"params": [parameter], "weight_decay": 0.3 * (parameter.ndim > 1)} for parameter in parameters]
    optimizers = NetworkAdamW(network, 1e-2, 0.3), torch.optim.AdamW(groups, lr=0.5e-2, fused=True)
    for _ in range(20):
        image = torch.randn(4, 3, 9, 9)
        for trained in (network, reference):
            trained.zero_grad()
            trained[:3](image).square().mean().backward()
        optimizers[0].step(0.5)
        optimizers[1].step()
    assert all(map(torch.equal, network.parameters(), parameters))


def test_warm_cosine_rises_then_falls_as_a_cosine():
    factors = [warm_cosine(100)(step) for step in (0, 4, 9, 10, 55, 99)]
    assert factors == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0], abs=1e-3)


def test_batch_order_has_every_sample_once_per_epoch():
    order = loop.batch_order(10, TrainSchedule(5, 4), seed=0)
    assert torch.equal(order.flatten().bincount(), torch.full((10,), 2))


def test_head_trainer_stops_each_head_by_its_own_patience_at_its_best(points):
    """The best state has the score that its check recorded."""
    (inputs, label), noise = points, random_labels(points)
    schedule, task = TrainSchedule(200, 32, patience=3, val_checks=20), CLASSIFICATION
    all_hparams = [HParams(3e-1, 1e-6, 0), HParams(1e-5, 1e-6, 1), HParams(1e-2, 1e-6, 2)]
    group = StackedLinear([12], 3, [hparams.seed for hparams in all_hparams])
    trainer, stopped_at = HeadTrainer(group, all_hparams, task, schedule), np.zeros(3, dtype=int)
    orders = torch.stack([loop.batch_order(300, schedule, hparams.seed) for hparams in all_hparams], dim=1)
    for index in orders:
        trainer.step(inputs, index, label[index])
        before = {name: values.clone() for name, values in trainer.best_state.items()}
        trainer.validate_if_due(noise)
        for head in np.flatnonzero(stopped_at):  # still trained with the others, but no longer recorded
            assert all(torch.equal(values[head], before[name][head]) for name, values in trainer.best_state.items())
        stopped_at = np.where((trainer.checks_since_best >= 3) & (stopped_at == 0), trainer.steps, stopped_at)
        if trainer.is_done:
            break
    assert len(set(stopped_at)) > 1
    trainer.restore_best()
    np.testing.assert_allclose(task.score(evaluate(group, noise, task, 64).sum(1)), trainer.best_scores)
    for head, hparams in enumerate(all_hparams):  # alone, each head stops at the same step
        alone = fit_linear(*points, [hparams], 200, patience=3, validation=noise)
        torch.testing.assert_close(head_weights(alone, 0), head_weights(group, head), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["own order", "one order", "dense"])
def test_fit_with_patience_stops_at_the_best_check_and_graphed_steps_do_too(
    use_graphed_steps, monkeypatch, points, maps, head
):
    """Validation labels are random, or inverted: some head soon gets worse."""
    stopped_at, steps = [], 30 if head == "dense" else 200

    class RecordingTrainer(HeadTrainer):
        def restore_best(self):
            stopped_at.append(self.steps)
            super().restore_best()

    if head == "dense":
        validation = SplitData([level[:6] for level in maps[0]], 1 - maps[1][:6].clamp(max=1))
        fit = partial(fit_upernet, *maps, HPARAMS[:1], steps)
    else:
        hparams = [replace(hparams, seed=5) if head == "one order" else hparams for hparams in HPARAMS]
        validation, fit = random_labels(points), partial(fit_linear, *points, hparams, steps)
    monkeypatch.setattr(loop, "HeadTrainer", RecordingTrainer)
    plain = fit(patience=1, validation=validation)
    use_graphed_steps()
    graphed = fit(patience=1, validation=validation)
    assert stopped_at[0] == stopped_at[1] < steps
    for index in range(len(plain)):
        difference = head_weights(graphed, index) - head_weights(plain, index)
        assert difference.norm() / head_weights(plain, index).norm() < 1e-3
    assert all(parameter.grad is None for parameter in graphed.parameters())
    if head == "dense":
        assert mean_iou(plain, validation)[0] > mean_iou(fit(), validation)[0]
