"""The tasks: classification, multi-label classification and segmentation.

A task class defines the format of the labels, the loss, the predictions, the metric and the kind of head. An instance
also has the number of classes and their weights. A new task is one more class in `TASKS`, and its name in
`TaskName` of pipeline/config.py.

A score is computed from summed counts per sample, so it can be recomputed and resampled from stored tables. The
counts of a sample are a flattened confusion matrix (actual class x predicted class). For multi-label tasks they are
the true positives, false positives and false negatives of every class.

A class that the labels lack has no score of its own and is not part of a mean over classes, whatever is predicted:
docs/decisions/absent-classes.md. Pixels or chips that are wrongly given such a class lower the score of their class.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from pipeline.errors import UserError

if TYPE_CHECKING:  # torch takes 3 s to import; the processes that write images and the report need none
    import pandas as pd
    import torch

# Mask value of a pixel without a label. It is also the value of all elements of a missing multi-hot label.
IGNORE = 255
# Class index of a sample without a label; no class can have it.
NO_CLASS = -(2**31)


# Scores of classes, from their counts


@dataclass(frozen=True)
class ClassCounts:
    """Number of hits and errors of every class, each (…, class)."""

    true_positives: np.ndarray
    false_positives: np.ndarray
    false_negatives: np.ndarray

    @property
    def support(self) -> np.ndarray:
        """Number of labels of every class."""
        return self.true_positives + self.false_negatives

    @property
    def predicted(self) -> np.ndarray:
        """Number of predictions of every class."""
        return self.true_positives + self.false_positives

    @property
    def recall(self) -> np.ndarray:
        """Share of a class's labels that are predicted, which is the producer's accuracy."""
        return _ratio(self.true_positives, self.support)

    @property
    def precision(self) -> np.ndarray:
        """Share of a class's predictions that are right, which is the user's accuracy; 0 without predictions."""
        return _ratio(self.true_positives, self.predicted)

    @property
    def iou(self) -> np.ndarray:
        return _ratio(self.true_positives, self.support + self.false_positives)

    @property
    def f1(self) -> np.ndarray:
        return _ratio(2 * self.true_positives, self.support + self.predicted)

    def sum(self) -> "ClassCounts":
        """Return the counts of all classes together, each (…, 1)."""
        parts = self.true_positives, self.false_positives, self.false_negatives
        return ClassCounts(*(part.sum(axis=-1, keepdims=True) for part in parts))

    def mean_over_present(self, values: np.ndarray) -> np.ndarray:
        """Average values of classes over those that the labels have; 0 without labels."""
        is_present = self.support > 0
        return _ratio((values * is_present).sum(axis=-1), is_present.sum(axis=-1))


def _ratio(part: np.ndarray, total: np.ndarray) -> np.ndarray:
    return part / np.maximum(total, 1)


METRICS: dict[str, Callable[[ClassCounts], np.ndarray]] = {
    "accuracy": lambda counts: counts.sum().recall[..., 0],
    "balanced accuracy": lambda counts: counts.mean_over_present(counts.recall),
    "micro F1": lambda counts: counts.sum().f1[..., 0],
    "macro F1": lambda counts: counts.mean_over_present(counts.f1),
    "mean IoU": lambda counts: counts.mean_over_present(counts.iou),
}


# Tasks


class TaskType(StrEnum):
    """Names of the tasks, as in params.yaml and in the attributes of stores."""

    CLASSIFICATION = "classification"
    MULTILABEL = "multilabel"
    SEGMENTATION = "segmentation"


@dataclass(frozen=True)
class Task(ABC):
    """A task on a dataset. Class attributes and class methods do not depend on the number of classes.

    Attributes:
        class_weights: weights of the classes in the loss; None for equal weights.
        is_dense: whether it predicts every pixel, from feature pyramids; else a chip, from pooled vectors.
        is_multilabel: whether a sample can have several classes, or none.
        ignore_value: label value that does not count in loss and score; None if every value counts.
        missing_value: value of the label of a sample without one (split `unlabelled`).
        label_dims, label_dtype: dimensions and dtype of the stored labels.
        metric: name of the score; further_metrics: of others that are reported. Names of `METRICS`.
    """

    n_classes: int
    class_weights: tuple[float, ...] | None = None

    type: ClassVar[TaskType]
    metric: ClassVar[str]
    further_metrics: ClassVar[tuple[str, ...]]
    is_dense: ClassVar[bool] = False
    is_multilabel: ClassVar[bool] = False
    ignore_value: ClassVar[int | None] = None
    missing_value: ClassVar[int] = IGNORE
    label_dims: ClassVar[tuple[str, ...]]
    label_dtype: ClassVar[DTypeLike]

    # Labels

    @classmethod
    @abstractmethod
    def label_shape(cls, n_classes: int, image_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of one sample's label, for images of `image_size` (y, x)."""

    @classmethod
    def missing_label(cls, n_classes: int, image_size: tuple[int, ...]) -> np.ndarray:
        """Return the label of a sample without one: `missing_value` everywhere."""
        return np.full(cls.label_shape(n_classes, image_size), cls.missing_value, cls.label_dtype)

    @classmethod
    @abstractmethod
    def label_from_mask(cls, mask: np.ndarray, n_classes: int) -> np.ndarray | np.int64:
        """Return the label of a chip whose pixels have the classes of `mask`, (y, x) with `IGNORE`."""

    @classmethod
    @abstractmethod
    def classes_present(cls, label: np.ndarray) -> np.ndarray:
        """Return the sorted indices of the classes in a label, int64 (class,)."""

    def is_valid_label(self, label: np.ndarray) -> bool:
        """Whether all values of labels are among the classes, or are `ignore_value`."""
        if label.dtype.kind == "u" and label.size and label.max() < self.n_classes:  # the usual case, in one pass
            return True
        outside = (label < 0) | (label >= self.n_classes)
        return not (outside if self.ignore_value is None else outside & (label != self.ignore_value)).any()

    def class_frequencies(self, label: np.ndarray) -> np.ndarray:
        """Count how often every class occurs in labels, int64 (class,)."""
        label = label.ravel() if self.ignore_value is None else label[label != self.ignore_value]
        return np.bincount(label, minlength=self.n_classes)

    # Predictions of finite logits, with numpy

    @classmethod
    def predict(cls, logits: np.ndarray, axis: int = 1) -> np.ndarray:
        """Return the class of highest logit along `axis`, or, multi-label, 0 or 1 for every class; int64."""
        return logits.argmax(axis=axis)

    @classmethod
    def probabilities(cls, logits: np.ndarray, axis: int = 1) -> np.ndarray:
        """Return the probabilities of the classes along `axis`; the shape and dtype of `logits`."""
        powers = np.exp(logits - logits.max(axis=axis, keepdims=True))
        return powers / powers.sum(axis=axis, keepdims=True)

    # Scores

    def counts(self, predicted: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Count every sample's hits and errors, int64 (sample, entry); see the top of this file."""
        n_samples, n_cells = len(label), self.n_classes**2
        label = label.reshape(n_samples, -1)
        # Every sample has one more cell, for the ignored elements, which is dropped at the end.
        first_cell = np.arange(n_samples)[:, None] * (n_cells + 1)
        cell = first_cell + predicted.reshape(n_samples, -1) + label.astype(np.int64) * self.n_classes
        if self.ignore_value is not None:
            np.copyto(cell, first_cell + n_cells, where=label == self.ignore_value)
        counts = np.bincount(cell.ravel(), minlength=n_samples * (n_cells + 1))
        return counts.reshape(n_samples, -1)[:, :n_cells]

    def score(self, counts: np.ndarray, metric: str | None = None) -> np.ndarray:
        """Compute a metric in [0, 1], (…), from summed counts (…, entry); by default that of the task."""
        return METRICS[metric or self.metric](self.class_counts(counts))

    def class_counts(self, counts: np.ndarray) -> ClassCounts:
        """Return hits and errors of every class, each (…, class), from summed counts (…, entry)."""
        confusion = counts.reshape(*counts.shape[:-1], self.n_classes, self.n_classes)
        hits = np.diagonal(confusion, axis1=-2, axis2=-1)
        return ClassCounts(hits, confusion.sum(axis=-2) - hits, confusion.sum(axis=-1) - hits)

    # Training, with torch

    def loss(self, logits: "torch.Tensor", label: "torch.Tensor") -> "torch.Tensor":
        """Compute the mean loss of each head, (head,).

        Cross-entropy over the samples or pixels that count. With class weights the mean is over the weights, as in
        torch. Multi-label: binary cross-entropy.

        Args:
            logits: (head, batch, class, …).
            label: (head, batch, …), or, multi-label, (head, batch, class).
        """
        from torch.nn import functional  # torch takes 3 s to import; the processes that write images need none

        label = label.long()
        weights = None if self.class_weights is None else _weights_tensor(self.class_weights, logits.device)
        ignore_index = -100 if self.ignore_value is None else self.ignore_value
        losses = functional.cross_entropy(
            logits.flatten(0, 1), label.flatten(0, 1), weights, ignore_index=ignore_index, reduction="none"
        ).view(label.shape)
        if self.ignore_value is None and weights is None:
            return losses.flatten(1).mean(dim=1)
        counted = label != ignore_index
        counted = counted * weights[label * counted] if weights is not None else counted
        return losses.flatten(1).sum(dim=1) / counted.flatten(1).sum(dim=1).clamp_min(1e-12)

    def predict_labels(self, logits: "torch.Tensor", label: "torch.Tensor", dim: int) -> "torch.Tensor":
        """Return the predictions, int64; non-finite logits give a wrong prediction.

        The argmax of NaN is 0 in torch, so a diverged head would be right wherever the label is class 0.

        Args:
            logits: the classes lie along `dim`.
            label: the labels, broadcast to the predictions; needed to choose a wrong class.
        """
        predicted = logits.max(dim=dim).indices
        if logits.sum().isfinite():
            return predicted
        wrong = (label.long() + 1) % self.n_classes
        return predicted.where(logits.isfinite().all(dim=dim), wrong)


class Classification(Task):
    """One class per chip."""

    type, metric = TaskType.CLASSIFICATION, "accuracy"
    further_metrics = ("balanced accuracy", "macro F1")
    missing_value = NO_CLASS
    label_dims, label_dtype = ("sample",), np.int64

    @classmethod
    def label_shape(cls, n_classes: int, image_size: tuple[int, ...]) -> tuple[int, ...]:
        return ()

    @classmethod
    def label_from_mask(cls, mask: np.ndarray, n_classes: int) -> np.ndarray | np.int64:
        """Return the class of the largest area."""
        return np.int64(np.bincount(mask[mask != IGNORE], minlength=n_classes).argmax())

    @classmethod
    def classes_present(cls, label: np.ndarray) -> np.ndarray:
        return np.atleast_1d(label).astype(np.int64)


class MultiLabel(Task):
    """Any number of classes per chip."""

    type, metric = TaskType.MULTILABEL, "micro F1"
    further_metrics = ("macro F1",)
    is_multilabel = True
    label_dims, label_dtype = ("sample", "class"), np.uint8

    @classmethod
    def label_shape(cls, n_classes: int, image_size: tuple[int, ...]) -> tuple[int, ...]:
        return (n_classes,)

    @classmethod
    def label_from_mask(cls, mask: np.ndarray, n_classes: int) -> np.ndarray | np.int64:
        """Return a multi-hot label: the classes of at least one pixel."""
        return (np.bincount(mask[mask != IGNORE], minlength=n_classes) > 0).astype(np.uint8)

    @classmethod
    def classes_present(cls, label: np.ndarray) -> np.ndarray:
        return np.flatnonzero(label)

    def is_valid_label(self, label: np.ndarray) -> bool:
        """Whether labels are multi-hot, of all classes."""
        return bool(((label == 0) | (label == 1)).all() and label.shape[-1] == self.n_classes)

    def class_frequencies(self, label: np.ndarray) -> np.ndarray:
        return label.reshape(-1, self.n_classes).sum(axis=0, dtype=np.int64)

    @classmethod
    def predict(cls, logits: np.ndarray, axis: int = 1) -> np.ndarray:
        return (logits > 0).astype(np.int64)

    @classmethod
    def probabilities(cls, logits: np.ndarray, axis: int = 1) -> np.ndarray:
        return 1 / (1 + np.exp(-logits))

    def counts(self, predicted: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Count true positives, false positives and false negatives, (sample, 3 * class)."""
        counts = predicted & label, predicted & ~label & 1, label & ~predicted & 1
        return np.stack(counts, axis=1).reshape(len(label), -1).astype(np.int64)

    def class_counts(self, counts: np.ndarray) -> ClassCounts:
        return ClassCounts(*np.moveaxis(counts.reshape(*counts.shape[:-1], 3, self.n_classes), -2, 0))

    def loss(self, logits: "torch.Tensor", label: "torch.Tensor") -> "torch.Tensor":
        from torch.nn import functional  # torch takes 3 s to import; the processes that write images need none

        losses = functional.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), reduction="none")
        return losses.flatten(1).mean(dim=1)

    def predict_labels(self, logits: "torch.Tensor", label: "torch.Tensor", dim: int) -> "torch.Tensor":
        predicted = (logits > 0).long()
        if logits.sum().isfinite():
            return predicted
        return predicted.where(logits.isfinite(), 1 - label.long())


class Segmentation(Task):
    """One class per pixel; pixels without a label have `IGNORE`."""

    type, metric = TaskType.SEGMENTATION, "mean IoU"
    further_metrics = ("accuracy", "balanced accuracy", "macro F1")
    is_dense = True
    ignore_value = IGNORE
    label_dims, label_dtype = ("sample", "y", "x"), np.uint8

    @classmethod
    def label_shape(cls, n_classes: int, image_size: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(image_size)

    @classmethod
    def label_from_mask(cls, mask: np.ndarray, n_classes: int) -> np.ndarray | np.int64:
        return mask

    @classmethod
    def classes_present(cls, label: np.ndarray) -> np.ndarray:
        return np.unique(label[label != IGNORE]).astype(np.int64)


TASKS: dict[str, type[Task]] = {task.type.value: task for task in (Classification, MultiLabel, Segmentation)}


def get_task(name: str, key: str = "task") -> type[Task]:
    """Return the class of a task; UserError with the key of the name's origin if there is none."""
    if name not in TASKS:
        message = f"{key} is '{name}'. Choose one of: {', '.join(TASKS)}."
        raise UserError(message, key=key, value=name, allowed=TASKS)
    return TASKS[name]


@lru_cache
def _weights_tensor(weights: tuple[float, ...], device: "torch.device") -> "torch.Tensor":
    """Class weights, float32, copied to the device once: a CUDA graph cannot copy them."""
    import torch  # takes 3 s to import; the processes that write images need none

    with torch.inference_mode(False):  # else weights first used in inference could not be trained with
        return torch.tensor(weights, device=device)


def counts_from_table(table: "pd.DataFrame", task: Task) -> tuple[list[str], np.ndarray]:
    """Return the sample names, sorted, and counts (seed, sample, entry) of a table of test predictions."""
    table = table.sort_values(["seed", "sample"], kind="stable")
    n_seeds = table.seed.nunique()
    samples = table["sample"].iloc[: len(table) // n_seeds].tolist()
    has_counts = "counts" in table
    counts = np.stack(table.counts) if has_counts else task.counts(np.stack(table.predicted), np.stack(table.label))
    return samples, counts.reshape(n_seeds, len(samples), -1)
