from functools import partial

import numpy as np
import pytest
import torch

from pipeline.heads.dense import HeadList
from pipeline.heads.linear import StackedLinear
from pipeline.heads.upernet import UPerNet
from pipeline.tasks import Classification, MultiLabel, Segmentation, get_task
from pipeline.training import loop
from pipeline.training.evaluate import evaluate
from pipeline.training.feature_loader import SplitData
from pipeline.training.head_trainer import HeadTrainer, HParams, TrainSchedule
from pipeline.training.optim import warm_cosine

SETTINGS = [HParams(1e-2, 1e-4, 0), HParams(1e-3, 1e-1, 1), HParams(3e-2, 1e-6, 2)]


@pytest.fixture
def side_by_side():
    """Two cores for the lanes, whatever share of the machine this process has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def linear(inputs, label, settings, steps=60, kind="classification", classes=3, **more):
    make = partial(StackedLinear, [inputs.shape[1]], classes)
    return loop.fit(make, SplitData(inputs, label), get_task(kind)(classes), settings, TrainSchedule(steps, batch=32), **more)


def upernet(levels, label, settings, steps=20, precision="float32", **more):
    def make(seeds):
        return HeadList(lambda: UPerNet([4] * 4, 2, 8), (32, 32), seeds, precision)

    task, patience = Segmentation(2), more.pop("patience", 0)
    recipe = TrainSchedule(steps, batch=4, patience=patience, val_checks=5)
    return loop.fit(make, SplitData(levels, label), task, settings, recipe, **more), task


def weights(group, head):
    """One head's parameters, one after the other."""
    if group.is_stacked:
        return torch.cat([one.detach()[head].flatten() for one in group.parameters()])
    return torch.cat([one.detach().flatten() for one in group.heads[head].parameters()])


def test_linear_heads_learn_what_there_is(points):
    counts = evaluate(linear(*points, SETTINGS, steps=300), SplitData(*points), Classification(3), 64)
    assert counts.shape == (3, 300, 9)
    assert Classification(3).score(counts.sum(1)).max() > 0.95


def test_upernet_learns_and_unlabelled_pixels_do_not_count(maps):
    group, task = upernet(*maps, [HParams(1e-2, 1e-4, 0)], steps=100)
    counts = evaluate(group, SplitData(*maps), task, 8)
    assert counts.sum() == (maps[1] != 255).sum()
    assert Segmentation(2).score(counts.sum(1))[0] > 0.75


def test_ignored_pixels_do_not_pull(maps):
    """Only labelled pixels pull: with every label ignored the loss is nothing, with some it is theirs alone."""
    _, label = maps
    logits = torch.randn(1, 20, 2, 32, 32)
    task = Segmentation(2)
    assert task.loss(logits, torch.full_like(label, 255)[None]).item() == 0
    valid = (label != 255).nonzero(as_tuple=True)
    alone = torch.nn.functional.cross_entropy(logits[0].permute(0, 2, 3, 1)[valid], label[valid])
    torch.testing.assert_close(task.loss(logits, label[None])[0], alone)


@pytest.mark.usefixtures("side_by_side")
def test_a_head_among_others_is_the_head_alone(points, maps):
    together = linear(*points, SETTINGS)
    for head, setting in enumerate(SETTINGS):
        alone = linear(*points, [setting])
        torch.testing.assert_close(weights(together, head), weights(alone, 0), rtol=1e-4, atol=1e-5)
    together, _ = upernet(*maps, SETTINGS)
    for head, setting in enumerate(SETTINGS):
        assert torch.equal(weights(together, head), weights(upernet(*maps, [setting])[0], 0))


@pytest.mark.parametrize("rows", [60, 300])
def test_heads_of_one_seed_share_batches_and_others_have_their_own(points, rows):
    """The same numbers from shared batches, from a product over all rows, and from each head's own rows."""
    inputs, label = (one[:rows] for one in points)
    shared = linear(inputs, label, [HParams(1e-2, 1e-3, 7)] * 2)
    mixed = linear(inputs, label, [HParams(1e-2, 1e-3, 7), HParams(1e-2, 1e-3, 8)])
    torch.testing.assert_close(weights(shared, 0), weights(mixed, 0), rtol=1e-4, atol=1e-5)
    assert (weights(mixed, 0) - weights(mixed, 1)).abs().max() > 0.01
    assert not torch.equal(loop.batch_order(rows, TrainSchedule(9, 4), 7), loop.batch_order(rows, TrainSchedule(9, 4), 8))


@pytest.mark.usefixtures("side_by_side")
def test_the_same_seed_gives_the_same_bytes(points, maps):
    for first, second in ([linear(*points, SETTINGS) for _ in "ab"], [upernet(*maps, SETTINGS)[0] for _ in "ab"]):
        assert all(torch.equal(weights(first, head), weights(second, head)) for head in range(3))


def test_the_loop_is_torchs_adamw_on_torchs_loss(points):
    """One head, retraced with nn.Linear, AdamW and cross_entropy alone."""
    inputs, label = points
    setting, steps = HParams(1e-2, 1e-2, 5), 25
    ours = linear(inputs, label, [setting], steps)
    torch.manual_seed(5)
    theirs = torch.nn.Linear(12, 3)
    groups = [{"params": [theirs.weight], "weight_decay": 1e-2}, {"params": [theirs.bias], "weight_decay": 0}]
    optimiser = torch.optim.AdamW(groups, lr=1e-2)
    batches, factor = loop.batch_order(len(label), TrainSchedule(steps, 32), 5), warm_cosine(steps)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * factor(step)
        index = batches[step]
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(theirs(inputs[index]), label[index]).backward()
        optimiser.step()
    torch.testing.assert_close(ours.weights[0][0], theirs.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.biases[0][0], theirs.bias, rtol=1e-5, atol=1e-6)


def test_strong_decay_leaves_the_majority_class(points):
    """Biases do not decay: a head decayed to nothing still knows how frequent the classes are."""
    inputs, label = points
    label = torch.where(torch.arange(300) < 200, 2, label)
    group = linear(inputs, label, [HParams(1e-2, 100.0, 0)], steps=300)
    probability = group.biases[0][0].softmax(0)
    frequency = label.bincount(minlength=3) / 300
    torch.testing.assert_close(probability, frequency, atol=0.05, rtol=0)


def test_multilabel(image_dataset):
    """Real labels: the land-use classes present in each tile, from the bands' means."""
    tiles = image_dataset("sample-landuse-seg", task="multilabel")
    inputs = torch.from_numpy(tiles.image.mean(axis=(2, 3), dtype=np.float64)).float()
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    label = torch.from_numpy(tiles.label.astype(np.int64))
    task = MultiLabel(7)
    group = linear(inputs, label, SETTINGS, 400, "multilabel", 7)
    scores = MultiLabel(7).score(evaluate(group, SplitData(inputs, label), task, 16).sum(1))
    always = MultiLabel(7).counts(np.ones_like(label.numpy()), label.numpy())
    assert scores.max() > MultiLabel(7).score(always.sum(0))


def test_every_epoch_sees_every_sample():
    seen = loop.batch_order(10, TrainSchedule(5, 4), seed=0)
    assert torch.equal(seen.flatten().bincount(), torch.full((10,), 2))


def test_heads_stop_each_in_its_own_time_and_end_at_their_best(points, maps):
    """On validation labels that are noise; the kept head is one that the checks saw, and scored what they noted."""
    inputs, label = points
    noise = SplitData(inputs, label[torch.randperm(300, generator=torch.Generator().manual_seed(1))])
    recipe, task = TrainSchedule(200, 32, patience=3, val_checks=20), Classification(3)
    settings = [HParams(3e-1, 1e-6, 0), HParams(1e-5, 1e-6, 1), HParams(1e-2, 1e-6, 2)]
    group = StackedLinear([12], 3, [one.seed for one in settings])
    lane = HeadTrainer(group, settings, task, recipe)
    orders = torch.stack([loop.batch_order(300, recipe, one.seed) for one in settings], dim=1)
    stopped = np.zeros(3, dtype=int)
    for index in orders:
        lane.step(inputs, index, label[index])
        if lane.check_is_due():
            before = {name: values.clone() for name, values in lane.state.items()}
            lane.check(evaluate(group, noise, task, 64))
            for head in np.flatnonzero(stopped):  # trained on beside the others, and not kept
                assert all(torch.equal(values[head], before[name][head]) for name, values in lane.state.items())
            stopped = np.where((lane.since >= 3) & (stopped == 0), lane.steps, stopped)
        if lane.done:
            break
    assert len(set(stopped)) > 1
    lane.restore()
    scores = Classification(3).score(evaluate(group, noise, task, 64).sum(1))
    np.testing.assert_allclose(scores, lane.best)
    for head, setting in enumerate(settings):  # together as alone, with the stops
        alone = loop.fit(partial(StackedLinear, [12], 3), SplitData(*points), task, [setting], recipe, noise)
        torch.testing.assert_close(weights(alone, 0), weights(group, head), rtol=1e-4, atol=1e-5)


def test_a_dense_head_ends_at_its_best_check(maps):
    validation = SplitData([level[:6] for level in maps[0]], 1 - maps[1][:6].clamp(max=1))
    kept, task = upernet(*maps, SETTINGS[:1], steps=40, patience=1, validation=validation)
    last, _ = upernet(*maps, SETTINGS[:1], steps=40)
    of = [Segmentation(2).score(evaluate(one, validation, task, 8).sum(1))[0] for one in (kept, last)]
    assert of[0] > of[1], "labels turned round are matched best before training"


def test_class_weights_are_torchs(maps):
    logits, label = torch.randn(2, 5, 3, 8, 8), torch.randint(3, (2, 5, 8, 8))
    label[:, :, :3] = 255
    task = Segmentation(3, (0.2, 1.0, 4.0))
    for ours, x, y in zip(task.loss(logits, label), logits, label, strict=True):
        theirs = torch.nn.functional.cross_entropy(x, y, torch.tensor(task.class_weights), ignore_index=255)
        torch.testing.assert_close(ours, theirs)


def test_bfloat16_trains_and_keeps_parameters_in_float32(maps):
    group, task = upernet(*maps, SETTINGS[:1], steps=100, precision="bfloat16")
    assert {parameter.dtype for parameter in group.parameters()} == {torch.float32}
    full, _ = upernet(*maps, SETTINGS[:1], steps=100)
    assert not torch.equal(weights(group, 0), weights(full, 0))
    of = [
        Segmentation(2).score(evaluate(one, SplitData(*maps), task, 8).sum(1))[0] for one in (group, full)
    ]
    assert of[0] == pytest.approx(of[1], abs=0.05)
