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
from pipeline.training.optim import warm_cosine
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


def fit_linear(inputs, label, hparams, steps=60, task=CLASSIFICATION, **options):
    make_group = partial(StackedLinear, [inputs.shape[1]], task.n_classes)
    return loop.fit(make_group, SplitData(inputs, label), task, hparams, TrainSchedule(steps, batch=32), **options)


def fit_upernet(levels, label, hparams, steps=10, precision="float32", patience=0, task=SEGMENTATION, **options):
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
    return Segmentation(2).score(evaluate(group, data, Segmentation(2), 8).sum(1))


def test_fit_of_linear_heads_learns_a_linear_rule(points):
    counts = evaluate(fit_linear(*points, HPARAMS, steps=300), SplitData(*points), Classification(3), 64)
    assert counts.shape == (3, 300, 9)
    assert Classification(3).score(counts.sum(1)).max() > 0.95


def test_fit_of_upernet_learns_and_ignores_unlabelled_pixels(maps):
    group = fit_upernet(*maps, [HParams(1e-2, 1e-4, 0)], steps=60)
    counts = evaluate(group, SplitData(*maps), Segmentation(2), 8)
    assert counts.sum() == (maps[1] != IGNORE).sum()
    assert Segmentation(2).score(counts.sum(1))[0] > 0.75


@pytest.mark.usefixtures("two_cores")
def test_fit_of_a_head_among_others_equals_the_head_alone(points, maps):
    together = fit_linear(*points, HPARAMS)
    for head, hparams in enumerate(HPARAMS):
        alone = fit_linear(*points, [hparams])
        torch.testing.assert_close(head_weights(together, head), head_weights(alone, 0), rtol=1e-4, atol=1e-5)
    together = fit_upernet(*maps, HPARAMS)
    for head, hparams in enumerate(HPARAMS):
        assert torch.equal(head_weights(together, head), head_weights(fit_upernet(*maps, [hparams]), 0))


@pytest.mark.parametrize("n_rows", [60, 300])
def test_fit_with_equal_seeds_shares_batches_and_with_others_does_not(points, n_rows):
    """Shared batches, and each head's own rows, give the same numbers."""
    inputs, label = (values[:n_rows] for values in points)
    shared = fit_linear(inputs, label, [HParams(1e-2, 1e-3, 7)] * 2)
    different = fit_linear(inputs, label, [HParams(1e-2, 1e-3, 7), HParams(1e-2, 1e-3, 8)])
    torch.testing.assert_close(head_weights(shared, 0), head_weights(different, 0), rtol=1e-4, atol=1e-5)
    assert (head_weights(different, 0) - head_weights(different, 1)).abs().max() > 0.01
    orders = [loop.batch_order(n_rows, TrainSchedule(9, 4), seed) for seed in (7, 8)]
    assert not torch.equal(*orders)


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_fit_twice_has_the_same_bytes(points, maps, head):
    runs = [fit_linear(*points, HPARAMS) if head == "linear" else fit_upernet(*maps, HPARAMS) for _ in range(2)]
    assert all(torch.equal(*(head_weights(group, index) for group in runs)) for index in range(3))


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


def test_fit_with_strong_decay_predicts_class_frequencies(points):
    """Biases do not decay: a head whose weights are zero still knows the frequencies of the classes."""
    inputs, label = points
    label = torch.where(torch.arange(300) < 200, 2, label)
    group = fit_linear(inputs, label, [HParams(1e-2, 100.0, 0)], steps=300)
    probability = group.biases[0][0].softmax(0)
    frequency = label.bincount(minlength=3) / 300
    torch.testing.assert_close(probability, frequency, atol=0.05, rtol=0)


def test_fit_of_multilabel_heads_learns_a_linear_rule(points):
    inputs, _ = points
    label = (inputs[:, :2] > 0).long()
    group = fit_linear(inputs, label, HPARAMS, 200, MultiLabel(2))
    scores = MultiLabel(2).score(evaluate(group, SplitData(inputs, label), MultiLabel(2), 64).sum(1))
    assert scores.max() > 0.95


def test_batch_order_has_every_sample_once_per_epoch():
    order = loop.batch_order(10, TrainSchedule(5, 4), seed=0)
    assert torch.equal(order.flatten().bincount(), torch.full((10,), 2))


def test_head_trainer_stops_each_head_by_its_own_patience_at_its_best(points):
    """Validation labels are random. The best state has the score that its check recorded."""
    inputs, label = points
    noise = SplitData(inputs, label[torch.randperm(300, generator=torch.Generator().manual_seed(1))])
    schedule, task = TrainSchedule(200, 32, patience=3, val_checks=20), Classification(3)
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
        alone = loop.fit(partial(StackedLinear, [12], 3), SplitData(*points), task, [hparams], schedule, noise)
        torch.testing.assert_close(head_weights(alone, 0), head_weights(group, head), rtol=1e-4, atol=1e-5)


def test_fit_of_a_dense_head_with_patience_ends_at_its_best_check(maps):
    """With inverted validation labels the score is best before training."""
    inverted = SplitData([level[:6] for level in maps[0]], 1 - maps[1][:6].clamp(max=1))
    best = fit_upernet(*maps, HPARAMS[:1], steps=30, patience=1, validation=inverted)
    last = fit_upernet(*maps, HPARAMS[:1], steps=30)
    assert mean_iou(best, inverted)[0] > mean_iou(last, inverted)[0]


def test_fit_in_bfloat16_has_float32_parameters_and_a_similar_score(maps):
    group = fit_upernet(*maps, HPARAMS[:1], steps=30, precision="bfloat16")
    assert {parameter.dtype for parameter in group.parameters()} == {torch.float32}
    full = fit_upernet(*maps, HPARAMS[:1], steps=30)
    assert not torch.equal(head_weights(group, 0), head_weights(full, 0))
    assert mean_iou(group, SplitData(*maps))[0] == pytest.approx(mean_iou(full, SplitData(*maps))[0], abs=0.05)
