"""Comparing models on one test set: differences against everything that could have made them by chance.

Two spreads matter: over seeds (initialisation and order of samples), and over test samples (which ones happened
to be in the set). The bootstrap draws both anew, so that an interval is wide if either is.
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


def bootstrap(task: str, counts: np.ndarray, classes: int, draws: int = 2000, stream: int = 0) -> np.ndarray:
    """Mean scores over resampled test samples and resampled seeds, (draws,).

    Every draw takes the same test samples for all seeds, and for all models with as many samples, so that
    differences between models are paired. Seeds are drawn from `stream`: those of two models are independent.

    Args:
        counts: (run, sample, cells); see pipeline/metrics.
    """
    runs, samples, cells = counts.shape
    picked = np.random.default_rng(0).integers(samples, size=(draws, samples))
    times = np.stack([np.bincount(row, minlength=samples) for row in picked])
    total = times @ counts.transpose(1, 0, 2).reshape(samples, -1)
    scores = metrics.score(task, total.reshape(draws, runs, cells), classes)
    seeds = np.random.default_rng([1, stream]).integers(runs, size=(draws, runs))
    return np.take_along_axis(scores, seeds, axis=1).mean(axis=1)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def difference(task: str, ours: np.ndarray, theirs: np.ndarray, classes: int) -> Difference:
    """Our mean score minus theirs, from counts (run, sample, cells) over the same test samples in one order."""
    gaps = bootstrap(task, ours, classes) - bootstrap(task, theirs, classes, stream=1)
    mean = [metrics.score(task, counts.sum(axis=1), classes).mean() for counts in (ours, theirs)]
    return Difference(float(mean[0] - mean[1]), *interval(gaps))
