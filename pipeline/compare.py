"""Comparing models on one test set: its size against the differences it could show.

Two spreads are kept apart. Seeds: the standard deviation of the score over runs, from initialisation and
sample order. Test set: the bootstrap over test samples, from which samples happened to be in it.
"""

from dataclasses import dataclass

import numpy as np

from pipeline import metrics


@dataclass(frozen=True)
class Difference:
    """Mean score of one model minus another's, with the 95 % interval of the paired bootstrap."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "cannot be told"


def bootstrap(task: str, counts: np.ndarray, classes: int, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Scores over resampled test sets, averaged over seeds, (draws,).

    Every draw takes the same test samples for all seeds; with one `seed` and one number of samples the draws
    are the same for every model, so that differences between models are paired.

    Args:
        counts: (run, sample, cells); see pipeline/metrics.
    """
    runs, samples, cells = counts.shape
    picked = np.random.default_rng(seed).integers(samples, size=(draws, samples))
    times = np.stack([np.bincount(row, minlength=samples) for row in picked])
    total = times @ counts.transpose(1, 0, 2).reshape(samples, -1)
    return metrics.score(task, total.reshape(draws, runs, cells), classes).mean(axis=1)


def difference(task: str, ours: np.ndarray, theirs: np.ndarray, classes: int) -> Difference:
    """Our mean score minus theirs, from counts (run, sample, cells) over the same test samples in one order."""
    gaps = bootstrap(task, ours, classes) - bootstrap(task, theirs, classes)
    low, high = np.quantile(gaps, [0.025, 0.975])
    mean = [metrics.score(task, counts.sum(axis=1), classes).mean() for counts in (ours, theirs)]
    return Difference(float(mean[0] - mean[1]), float(low), float(high))
