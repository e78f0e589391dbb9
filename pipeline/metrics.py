"""Scores from per-sample counts, so that every score can be recomputed and resampled from what is stored.

A sample's counts are a confusion matrix, flattened (true class x predicted class), or for multi-label
tasks true positives, false positives and false negatives per class. Counts add up over samples.
"""

import numpy as np

METRICS = {"classification": "accuracy", "multilabel": "micro F1", "segmentation": "mean IoU"}


def counts(task: str, predicted: np.ndarray, label: np.ndarray, classes: int, ignore: int | None) -> np.ndarray:
    """Counts of every sample, int64 (sample, cells).

    Args:
        predicted: class index (sample,) or (sample, y, x), or multi-hot (sample, class).
        label: the same shape; pixels that equal `ignore` do not count.
    """
    count = len(label)
    if task == "multilabel":
        hit, said, true = predicted & label, predicted & ~label & 1, label & ~predicted & 1
        return np.stack([hit, said, true], axis=1).reshape(count, -1).astype(np.int64)
    cells = classes * classes
    # Pixels that do not count get a cell of their own, which is then left out.
    keys = np.arange(count)[:, None] * (cells + 1) + predicted.reshape(count, -1)
    keys += label.reshape(count, -1).astype(np.int64) * classes
    if ignore is not None:
        skipped = np.broadcast_to(np.arange(1, count + 1)[:, None] * (cells + 1) - 1, keys.shape)
        np.copyto(keys, skipped, where=label.reshape(count, -1) == ignore)
    return np.bincount(keys.ravel(), minlength=count * (cells + 1)).reshape(count, -1)[:, :cells]


def score(task: str, total: np.ndarray, classes: int) -> np.ndarray:
    """The task's metric from added counts (…, cells): accuracy, micro F1, or mean IoU in [0, 1], (…).

    Mean IoU is over the classes that occur, in the labels or in the prediction.
    """
    if task == "multilabel":
        hit, said, true = np.moveaxis(total.reshape(*total.shape[:-1], 3, classes).sum(axis=-1), -1, 0)
        return 2 * hit / np.maximum(2 * hit + said + true, 1)
    matrix = total.reshape(*total.shape[:-1], classes, classes)
    hit = np.diagonal(matrix, axis1=-2, axis2=-1)
    if task == "classification":
        return hit.sum(axis=-1) / np.maximum(matrix.sum(axis=(-2, -1)), 1)
    union = matrix.sum(axis=-1) + matrix.sum(axis=-2) - hit
    occurs = union > 0
    return (hit / np.maximum(union, 1)).sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1)
