"""The slope that heads descend, against autograd's of the loss."""

import pytest
import torch

from pipeline.heads.dense import HeadList
from pipeline.heads.linear import StackedLinear
from pipeline.heads.upernet import UPerNet
from pipeline.tasks import Classification, MultiLabel, Segmentation, Task

TASKS = {
    "classes": Classification(4),
    "weighted": Classification(4, (0.2, 1.0, 4.0, 0.0)),
    "multilabel": MultiLabel(4),
}


def labels(task: Task, heads: int, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (heads, batch, task.n_classes) if task.type == "multilabel" else (heads, batch)
    return torch.randint(2 if task.type == "multilabel" else task.n_classes, shape, generator=generator)


@pytest.mark.parametrize("name", TASKS)
def test_the_slope_is_autograds(name):
    task, logits = TASKS[name], 3 * torch.randn(2, 9, 4)
    label, needed = labels(task, 2, 9), logits.clone().requires_grad_()
    task.loss(needed, label).sum().backward()
    torch.testing.assert_close(task.loss_grad(logits, label), needed.grad)
    assert needed.grad.abs().max() > 0.01


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("own", [True, False], ids=["own rows", "shared rows"])
def test_linear_heads_pull_as_autograd_does(name, own):
    task, inputs = TASKS[name], torch.randn(30, 6)
    group, label = StackedLinear([6], 4, seeds=(0, 1, 2)), labels(task, 3, 8)
    index = torch.randint(30, (3, 8)) if own else None
    rows = inputs if own else inputs[:8]
    ((_, logits),) = group.forward_heads(rows, index)
    wanted = torch.autograd.grad(task.loss(logits, label).sum(), list(group.parameters()))
    group.backward(rows, index, lambda logits, heads: task.loss_grad(logits, label[heads]))
    for parameter, theirs in zip(group.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, theirs)


MASKS = {
    "all pixels": Segmentation(4),
    "some ignored": Segmentation(4),
    "some ignored, others weighted": Segmentation(4, (0.2, 1.0, 4.0, 0.0)),
}


@pytest.mark.parametrize("size", [(24, 40), (8, 8), (5, 3)], ids=["finer masks", "the same grid", "coarser masks"])
@pytest.mark.parametrize("name", MASKS)
def test_dense_heads_pull_as_autograd_does_through_torchs_resize(name, size):
    """Two heads, each with its own rows; one mask is ignored whole."""
    task, generator = MASKS[name], torch.Generator().manual_seed(0)
    levels = [torch.randn(6, 5, side, side, generator=generator) for side in (8, 4, 2)]
    label = torch.randint(4, (2, 3, *size), generator=generator).to(torch.uint8)
    if task.ignore_value is not None:
        label[:, 0], label[:, 1, :2] = 255, 255
    group, index = HeadList(lambda: UPerNet([5, 5, 5], 4, 6), size, (0, 1)), torch.tensor([[0, 1, 2], [5, 3, 2]])
    wanted = []
    for head, rows, true in zip(group.heads, index, label, strict=True):
        resized = torch.nn.functional.interpolate(head([one[rows] for one in levels]), size, mode="bilinear")
        wanted += torch.autograd.grad(task.loss(resized[None], true[None]).sum(), list(head.parameters()))
    group.backward(levels, index, lambda logits, heads: task.loss_grad(logits, label[heads]))
    for parameter, theirs in zip(group.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, theirs, rtol=1e-4, atol=1e-6)
    assert max(one.abs().max() for one in wanted) > 0.01


def test_masks_without_a_label_pull_nowhere():
    logits, label = torch.randn(1, 2, 4, 5, 5), torch.full((1, 2, 5, 5), 255, dtype=torch.uint8)
    assert MASKS["some ignored"].loss_grad(logits, label).abs().max() == 0
    with pytest.raises(RuntimeError, match="out of bounds"):
        MASKS["all pixels"].loss_grad(logits, label)


@pytest.mark.parametrize("name", ["classes", "multilabel"])
def test_what_is_no_number_is_wrong(name):
    task, logits = TASKS[name], torch.randn(2, 9, 4)
    label = labels(task, 1, 9)[0]
    logits[0] = torch.nan
    logits[1, 3, 2] = torch.inf
    found = task.predict_labels(logits, label, dim=2)
    assert (found[0] != label).all()
    plain = (logits[1] > 0).long() if name == "multilabel" else logits[1].argmax(1)
    if name == "multilabel":
        plain[3, 2] = 1 - label[3, 2]
    else:
        plain[3] = (label[3] + 1) % task.n_classes
    assert torch.equal(found[1], plain)


def test_masks_of_a_diverged_head_are_wrong_where_they_count():
    task, label = Segmentation(2), torch.tensor([[[0, 1], [255, 1]]], dtype=torch.uint8)
    found = task.predict_labels(torch.full((1, 2, 2, 2), torch.nan), label, dim=1)
    assert found[0, 0].tolist() == [1, 0]
    assert found[0, 1, 1] == 0
