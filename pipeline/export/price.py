"""What a file of a student costs and is worth: bytes, images a second, and the score on the validation split."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from pipeline import metrics
from pipeline.data.image_store import IGNORE

# Chips that are scored and timed at once, and rounds of timing.
BATCH, ROUNDS = 16, 5


@dataclass(frozen=True)
class EvalSet:
    """Real chips, float32 (sample, band, y, x), and their labels."""

    image: np.ndarray
    label: np.ndarray


def validation_chips(images: xr.Dataset, limit: int) -> EvalSet:
    """The validation split, or the first `limit` chips of it."""
    rows = np.flatnonzero(images.split.values == "val")[:limit]
    return EvalSet(images.image[rows].values.astype(np.float32), images.label[rows].values)


def evaluate(logits: Callable[[np.ndarray], np.ndarray], chips: EvalSet, told: Mapping) -> float:
    """The task's metric (pipeline/metrics.py)."""
    batches = range(0, len(chips.image), BATCH)
    given = np.concatenate([logits(chips.image[at : at + BATCH]) for at in batches])
    task, classes = told["task"], len(told["classes"])
    predicted = (given > 0).astype(np.int64) if task == "multilabel" else given.argmax(axis=1)
    label = chips.label.astype(np.int64)
    counts = metrics.counts(task, predicted, label, classes, IGNORE if task == "segmentation" else None)
    return float(metrics.score(task, counts.sum(axis=0), classes))


def throughput(logits: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> float:
    """Images a second in batches, the median of some rounds after one warm-up, on this machine's processor."""
    batch = np.resize(image, (BATCH, *image.shape[1:]))
    taken = []
    for _ in range(ROUNDS + 1):
        begun = time.perf_counter()
        logits(batch)
        taken.append(time.perf_counter() - begun)
    return BATCH / statistics.median(taken[1:])
