"""Comparing models on one test set: differences against everything that could have made them by chance.

Two spreads are kept apart: over test samples (which ones happened to be in the set), by a bootstrap that takes the
same samples for every model, so that comparisons are paired; and over seeds (initialisation and order of samples).
A verdict must stand against both together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from pipeline import metrics

# So many that hundreds of pairs can still be told apart after Holm's correction: p is at least 2 / DRAWS.
N_DRAWS = 10_000
SIGNIFICANCE_LEVEL = 0.05
# Draws scored at once: many classes would else need gigabytes.
_AT_ONCE = 1000


@dataclass(frozen=True)
class BootstrapSamples:
    """Mean scores of one model over resampled test sets, over resampled seeds, and over both; each (draws,).

    `mean` is the score itself: the mean over seeds on the whole test set.
    """

    mean: float
    samples: np.ndarray
    seeds: np.ndarray
    both: np.ndarray


@dataclass(frozen=True)
class PairedDifference:
    """Mean score of one model minus another's, with 95 % intervals.

    Attributes:
        samples: over test samples, the seeds as they are.
        seeds: over seeds, the test samples as they are.
        both: over both, which the verdict goes by.
        p: two-sided, of `both`.
    """

    mean: float
    samples: tuple[float, float]
    seeds: tuple[float, float]
    both: tuple[float, float]
    p: float

    @property
    def verdict(self) -> str:
        low, high = self.both
        if low > 0:
            return "better"
        return "worse" if high < 0 else "cannot be told"


def bootstrap(task: str, counts: np.ndarray, classes: int, stream: int = 0) -> BootstrapSamples:
    """Resample the test samples and the seeds of one model.

    Every draw takes the same test samples for all seeds, and for all models with as many samples. Seeds are drawn
    from `stream`: those of two models are independent.

    Args:
        counts: (run, sample, cells), samples in one order for all models; see pipeline/metrics.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993; the percentile interval of chapter 13.
    """
    runs, samples, cells = counts.shape
    # As float64, which is exact for counts and multiplied far faster than integers.
    flat = counts.transpose(1, 0, 2).reshape(samples, -1).astype(np.float64)
    generator, parts = np.random.default_rng(0), []
    for _ in range(N_DRAWS // _AT_ONCE):
        picked = generator.integers(samples, size=(_AT_ONCE, samples))
        times = np.stack([np.bincount(row, minlength=samples) for row in picked])
        parts.append(metrics.score(task, (times @ flat).reshape(_AT_ONCE, runs, cells), classes))
    drawn = np.concatenate(parts)
    observed = metrics.score(task, counts.sum(axis=1), classes)
    seeds = np.random.default_rng([1, stream]).integers(runs, size=(N_DRAWS, runs))
    return BootstrapSamples(
        float(observed.mean()),
        drawn.mean(axis=1),
        observed[seeds].mean(axis=1),
        np.take_along_axis(drawn, seeds, axis=1).mean(axis=1),
    )


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap values."""
    low, high = np.quantile(values, [SIGNIFICANCE_LEVEL / 2, 1 - SIGNIFICANCE_LEVEL / 2])
    return float(low), float(high)


def paired_difference(ours: BootstrapSamples, theirs: BootstrapSamples) -> PairedDifference:
    """Our mean score minus theirs, paired by test samples."""
    gaps = ours.both - theirs.both
    # Twice the smaller tail; one is added, since the observed set is itself a possible draw.
    tail = 1 + min((gaps <= 0).sum(), (gaps >= 0).sum())
    return PairedDifference(
        ours.mean - theirs.mean,
        percentile_interval(ours.samples - theirs.samples),
        percentile_interval(ours.seeds - theirs.seeds),
        percentile_interval(gaps),
        float(min(1.0, 2 * tail / (len(gaps) + 1))),
    )


def pairwise_differences(draws: Mapping[str, BootstrapSamples]) -> dict[tuple[str, str], PairedDifference]:
    """Every pair of one data set's models, each once, the first named first."""
    return {(one, other): paired_difference(draws[one], draws[other]) for one, other in combinations(draws, 2)}


def holm_adjusted(p: np.ndarray) -> np.ndarray:
    """p-values adjusted for so many comparisons by Holm's method.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6, 1979.
    """
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted
