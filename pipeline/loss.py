"""What a head is asked, and how wrong it is."""

from dataclasses import dataclass

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

    kind: str
    classes: int
    ignore: int | None = None
    weights: tuple[float, ...] | None = None


def loss(logits: torch.Tensor, label: torch.Tensor, task: Task) -> torch.Tensor:
    """Mean loss of each head, (head,), from logits (head, batch, class, …) and labels (head, batch, …).

    Cross-entropy over the pixels or samples that count, weighted by class if the task says so (the mean is then over
    the weights, as torch's); binary cross-entropy for multi-label.
    """
    if task.kind == "multilabel":
        each = functional.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), reduction="none")
        return each.flatten(1).mean(dim=1)
    label = label.long()
    weights = None if task.weights is None else torch.tensor(task.weights, device=logits.device)
    ignore = task.ignore if task.ignore is not None else -100
    each = functional.cross_entropy(
        logits.flatten(0, 1), label.flatten(0, 1), weights, ignore_index=ignore, reduction="none"
    ).view(label.shape)
    if task.ignore is None and weights is None:
        return each.flatten(1).mean(dim=1)
    counted = label != ignore
    counted = counted * weights[label * counted] if weights is not None else counted
    return each.flatten(1).sum(dim=1) / counted.flatten(1).sum(dim=1).clamp_min(1e-12)
