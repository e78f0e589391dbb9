"""The slope that linear heads descend, against autograd's of the loss."""

import pytest
import torch

from pipeline.heads.linear import LinearGroup
from pipeline.training.loss import Task, loss, slope

TASKS = {
    "classes": Task("classification", 4),
    "weighted": Task("classification", 4, weights=(0.2, 1.0, 4.0, 0.0)),
    "multilabel": Task("multilabel", 4),
}


def labels(task: Task, heads: int, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (heads, batch, task.classes) if task.kind == "multilabel" else (heads, batch)
    return torch.randint(2 if task.kind == "multilabel" else task.classes, shape, generator=generator)


@pytest.mark.parametrize("name", TASKS)
def test_the_slope_is_autograds(name):
    task, logits = TASKS[name], 3 * torch.randn(2, 9, 4)
    label, needed = labels(task, 2, 9), logits.clone().requires_grad_()
    loss(needed, label, task).sum().backward()
    torch.testing.assert_close(slope(logits, label, task), needed.grad)
    assert needed.grad.abs().max() > 0.01


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("own", [True, False], ids=["own rows", "shared rows"])
def test_linear_heads_pull_as_autograd_does(name, own):
    task, inputs = TASKS[name], torch.randn(30, 6)
    group, label = LinearGroup([6], 4, seeds=(0, 1, 2)), labels(task, 3, 8)
    index = torch.randint(30, (3, 8)) if own else None
    rows = inputs if own else inputs[:8]
    ((_, logits),) = group.pieces(rows, index)
    wanted = torch.autograd.grad(loss(logits, label, task).sum(), list(group.parameters()))
    group.pull(rows, index, lambda logits: slope(logits, label, task))
    for parameter, theirs in zip(group.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, theirs)
