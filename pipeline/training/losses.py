"""What a head is asked, and how wrong it is."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Task:
    """What is asked.

    Attributes:
        kind: classification, multilabel or segmentation.
        classes: how many.
        ignore: the label value that does not count.
        weights: of the classes in the cross-entropy; None for equal ones.
    """

    type: str
    n_classes: int
    ignore_value: int | None = None
    class_weights: tuple[float, ...] | None = None


def loss(logits: torch.Tensor, label: torch.Tensor, task: Task) -> torch.Tensor:
    """Mean loss of each head, (head,), from logits (head, batch, class, …) and labels (head, batch, …).

    Cross-entropy over the pixels or samples that count, weighted by class if the task says so (the mean is then over
    the weights, as torch's); binary cross-entropy for multi-label.
    """
    if task.type == "multilabel":
        each = functional.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), reduction="none")
        return each.flatten(1).mean(dim=1)
    label = label.long()
    weights = None if task.class_weights is None else _weights(task.class_weights, logits.device)
    ignore = task.ignore_value if task.ignore_value is not None else -100
    each = functional.cross_entropy(
        logits.flatten(0, 1), label.flatten(0, 1), weights, ignore_index=ignore, reduction="none"
    ).view(label.shape)
    if task.ignore_value is None and weights is None:
        return each.flatten(1).mean(dim=1)
    counted = label != ignore
    counted = counted * weights[label * counted] if weights is not None else counted
    return each.flatten(1).sum(dim=1) / counted.flatten(1).sum(dim=1).clamp_min(1e-12)


def loss_grad(logits: torch.Tensor, label: torch.Tensor, task: Task) -> torch.Tensor:
    """The gradient of the sum of `loss` by logits (head, batch, class, …); the same shape.

    Softmax or sigmoid less what is true, over what the mean is taken of (Bishop 2006, section 4.3.4).
    """
    if task.type == "multilabel":
        return torch.sigmoid(logits).sub_(label).div_(logits[0].numel())
    label, counted = label.long(), None
    if task.ignore_value is not None:
        counted = label != task.ignore_value
        label = label * counted
    share = _share(label, counted, task, logits)
    steep = torch.softmax(logits, dim=2).mul_(share.unsqueeze(2))
    return steep.scatter_add_(2, label.unsqueeze(2), share.neg_().unsqueeze(2))


def _share(label: torch.Tensor, counted: torch.Tensor | None, task: Task, logits: torch.Tensor) -> torch.Tensor:
    """What each label counts for in its head's mean, (head, batch, …)."""
    if counted is None and task.class_weights is None:
        return logits.new_full(label.shape, 1 / label[0].numel())
    weight = logits.new_ones(()) if task.class_weights is None else _weights(task.class_weights, logits.device)[label]
    share = weight if counted is None else weight * counted
    return share / share.flatten(1).sum(dim=1).clamp_min(1e-12).view(-1, *[1] * (label.ndim - 1))


@lru_cache
@torch.inference_mode(False)  # or weights first made while predicting could not be trained with
def _weights(weights: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Of the classes, float32, on the device once: a recorded step cannot send them there."""
    return torch.tensor(weights, device=device)


def predict_labels(logits: torch.Tensor, label: torch.Tensor, task: Task, dim: int) -> torch.Tensor:
    """What logits say, int64: the class along `dim`, or, multi-label, 0 or 1 for every class.

    Where they are no numbers, as a diverged head's, it is anything but the label, which broadcasts: torch would say
    the first class, and on a set that mostly consists of that such a head would be the best.
    """
    several = task.type == "multilabel"
    found = (logits > 0).long() if several else logits.max(dim=dim).indices
    if logits.sum().isfinite():
        return found
    wrong = 1 - label.long() if several else (label.long() + 1) % task.n_classes
    finite = logits.isfinite() if several else logits.isfinite().all(dim=dim)
    return torch.where(finite, found, wrong)
