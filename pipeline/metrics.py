"""Counts per sample and the scores computed from them.

A score is computed from added counts, so it can be recomputed and resampled from what is stored. The counts of a
sample are a flattened confusion matrix (actual class x predicted class). For multi-label tasks they are the true
positives, false positives and false negatives of every class.
"""

import numpy as np


def confusion_counts(
    predicted: np.ndarray, label: np.ndarray, n_classes: int, ignore_value: int | None = None
) -> np.ndarray:
    """Count the confusion matrix of every sample.

    Args:
        predicted: class index (sample,) or (sample, y, x).
        label: class index of the same shape; elements equal to `ignore_value` do not count.

    Returns:
        int64 (sample, n_classes * n_classes), actual class first.
    """
    n_samples, n_cells = len(label), n_classes * n_classes
    # Every sample has one more cell, for the ignored elements; it is cut off at the end.
    cell = np.arange(n_samples)[:, None] * (n_cells + 1) + predicted.reshape(n_samples, -1)
    cell += label.reshape(n_samples, -1).astype(np.int64) * n_classes
    if ignore_value is not None:
        ignored_cell = np.broadcast_to(np.arange(1, n_samples + 1)[:, None] * (n_cells + 1) - 1, cell.shape)
        np.copyto(cell, ignored_cell, where=label.reshape(n_samples, -1) == ignore_value)
    counts = np.bincount(cell.ravel(), minlength=n_samples * (n_cells + 1))
    return counts.reshape(n_samples, -1)[:, :n_cells]


def multilabel_counts(predicted: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Count true positives, false positives and false negatives of every sample and class.

    Args:
        predicted, label: multi-hot (sample, class).

    Returns:
        int64 (sample, 3 * class): all true positives, then all false positives, then all false negatives.
    """
    tp, fp, fn = predicted & label, predicted & ~label & 1, label & ~predicted & 1
    return np.stack([tp, fp, fn], axis=1).reshape(len(label), -1).astype(np.int64)


def accuracy(counts: np.ndarray, n_classes: int) -> np.ndarray:
    """Compute the accuracy in [0, 1], (…), from added confusion counts (…, n_classes * n_classes)."""
    confusion = counts.reshape(*counts.shape[:-1], n_classes, n_classes)
    tp = np.diagonal(confusion, axis1=-2, axis2=-1)
    return tp.sum(axis=-1) / np.maximum(confusion.sum(axis=(-2, -1)), 1)


def mean_iou(counts: np.ndarray, n_classes: int) -> np.ndarray:
    """Compute the mean IoU in [0, 1], (…), from added confusion counts (…, n_classes * n_classes).

    The mean is over the classes that occur in the labels or in the predictions.
    """
    confusion = counts.reshape(*counts.shape[:-1], n_classes, n_classes)
    tp = np.diagonal(confusion, axis1=-2, axis2=-1)
    union = confusion.sum(axis=-1) + confusion.sum(axis=-2) - tp
    occurs = union > 0
    return (tp / np.maximum(union, 1)).sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1)


def micro_f1(counts: np.ndarray, n_classes: int) -> np.ndarray:
    """Compute the micro F1 in [0, 1], (…), from added multi-label counts (…, 3 * n_classes)."""
    tp, fp, fn = np.moveaxis(counts.reshape(*counts.shape[:-1], 3, n_classes).sum(axis=-1), -1, 0)
    return 2 * tp / np.maximum(2 * tp + fp + fn, 1)
