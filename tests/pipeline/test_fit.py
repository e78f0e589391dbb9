from functools import partial

import numpy as np
import pytest
import torch

from pipeline import fit, metrics
from pipeline.fit import Setting, Task
from pipeline.heads.linear import LinearGroup
from pipeline.heads.upernet import UperNetGroup

SETTINGS = [Setting(1e-2, 1e-4, 0), Setting(1e-3, 1e-1, 1), Setting(3e-2, 1e-6, 2)]


@pytest.fixture
def points():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 12, generator=generator)
    label = (inputs @ torch.randn(12, 3, generator=generator)).argmax(1)
    return inputs, label


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(20, 4, side, side, generator=generator) for side in (16, 8, 4, 2)]
    label = (levels[0][:, 0] > 0).long().repeat_interleave(2, 1).repeat_interleave(2, 2)
    label[:, :6] = 255
    return levels, label


def linear(inputs, label, settings, steps=60, kind="classification", classes=3):
    make = partial(LinearGroup, inputs.shape[1], classes)
    return fit.fit(make, inputs, label, Task(kind, classes), settings, steps, batch=32)


def upernet(levels, label, settings, steps=20):
    make = partial(UperNetGroup, [4] * 4, 8, 2, (32, 32))
    task = Task("segmentation", 2, ignore=255)
    return fit.fit(lambda seeds: make(seeds=seeds), levels, label, task, settings, steps, batch=4), task


def parameters(head):
    return torch.cat([parameter.detach().flatten() for parameter in head.parameters()])


def test_linear_heads_learn_what_there_is(points):
    counts = fit.evaluate(linear(*points, SETTINGS, steps=300), *points, Task("classification", 3), batch=64)
    assert counts.shape == (3, 300, 9)
    assert metrics.score("classification", counts.sum(1), 3).max() > 0.95


def test_upernet_learns_and_unlabelled_pixels_do_not_count(maps):
    group, task = upernet(*maps, [Setting(1e-2, 1e-4, 0)], steps=100)
    counts = fit.evaluate(group, *maps, task, batch=8)
    assert counts.sum() == (maps[1] != 255).sum()
    assert metrics.score("segmentation", counts.sum(1), 2)[0] > 0.75


def test_ignored_pixels_do_not_pull(maps):
    """Only labelled pixels pull: with every label ignored the loss is nothing, with some it is theirs alone."""
    _, label = maps
    logits = torch.randn(1, 20, 2, 32, 32)
    task = Task("segmentation", 2, ignore=255)
    assert fit.loss(logits, torch.full_like(label, 255)[None], task).item() == 0
    valid = (label != 255).nonzero(as_tuple=True)
    alone = torch.nn.functional.cross_entropy(logits[0].permute(0, 2, 3, 1)[valid], label[valid])
    torch.testing.assert_close(fit.loss(logits, label[None], task)[0], alone)


def test_a_head_among_others_is_the_head_alone(points, maps):
    together = linear(*points, SETTINGS)
    for head, setting in zip(together.heads, SETTINGS, strict=True):
        alone = linear(*points, [setting]).heads[0]
        torch.testing.assert_close(parameters(head), parameters(alone), rtol=1e-4, atol=1e-5)
    together, _ = upernet(*maps, SETTINGS)
    for head, setting in zip(together.heads, SETTINGS, strict=True):
        alone = upernet(*maps, [setting])[0].heads[0]
        assert torch.equal(parameters(head), parameters(alone))


def test_the_same_seed_gives_the_same_bytes(points, maps):
    assert torch.equal(parameters(linear(*points, SETTINGS)), parameters(linear(*points, SETTINGS)))
    assert torch.equal(parameters(upernet(*maps, SETTINGS)[0]), parameters(upernet(*maps, SETTINGS)[0]))


def test_the_loop_is_torchs_adamw_on_torchs_loss(points):
    """One head, retraced with nn.Linear, AdamW and cross_entropy alone."""
    inputs, label = points
    setting, steps = Setting(1e-2, 1e-2, 5), 25
    ours = linear(inputs, label, [setting], steps).heads[0]
    torch.manual_seed(5)
    theirs = torch.nn.Linear(12, 3)
    groups = [{"params": [theirs.weight], "weight_decay": 1e-2}, {"params": [theirs.bias], "weight_decay": 0}]
    optimiser = torch.optim.AdamW(groups, lr=1e-2)
    batches = fit._batches(len(label), 32, 5)
    factor = fit._warm_cosine(steps)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * factor(step)
        index = next(batches)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(theirs(inputs[index]), label[index]).backward()
        optimiser.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-5, atol=1e-6)


def test_strong_decay_leaves_the_majority_class(points):
    """Biases do not decay: a head decayed to nothing still knows how frequent the classes are."""
    inputs, label = points
    label = torch.where(torch.arange(300) < 200, 2, label)
    group = linear(inputs, label, [Setting(1e-2, 100.0, 0)], steps=300)
    probability = group.heads[0](torch.zeros(1, 12)).softmax(1)[0]
    frequency = label.bincount(minlength=3) / 300
    torch.testing.assert_close(probability, frequency, atol=0.05, rtol=0)


def test_multilabel(prepared):
    """Real labels: the land-use classes present in each tile, from the bands' means."""
    tiles = prepared("sample-landuse-seg", task="multilabel")
    inputs = torch.from_numpy(tiles.image.mean(axis=(2, 3), dtype=np.float64)).float()
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    label = torch.from_numpy(tiles.label.astype(np.int64))
    task = Task("multilabel", 7)
    group = linear(inputs, label, SETTINGS, 400, "multilabel", 7)
    scores = metrics.score("multilabel", fit.evaluate(group, inputs, label, task, 16).sum(1), 7)
    always = metrics.counts("multilabel", np.ones_like(label.numpy()), label.numpy(), 7, None)
    assert scores.max() > metrics.score("multilabel", always.sum(0), 7)


def test_every_epoch_sees_every_sample():
    batches = fit._batches(10, 4, seed=0)
    seen = torch.cat([next(batches) for _ in range(5)])
    assert torch.equal(seen.bincount(), torch.full((10,), 2))
