"""Compare models: on one test set by a paired bootstrap, over datasets as in GEO-Bench.

On one test set two sources of variation are separated: the test samples (which ones happen to be in the set) and the
seeds (initialization and order of training samples). The bootstrap uses the same test samples for every model, so
that comparisons are paired. A difference is significant only if it is larger than both variations together.

Sources of the summaries: Lacoste et al., GEO-Bench, NeurIPS 2023, arXiv 2306.03831 (scores of each dataset scaled
linearly; bootstrap over seeds, stratified by dataset); Agarwal et al., Deep
Reinforcement Learning at the Edge of the Statistical Precipice, NeurIPS 2021, arXiv 2108.13264 (interquartile mean).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

import numpy as np
import pandas as pd
from scipy.stats import trim_mean

from pipeline.tasks import Task

# The smallest possible p-value is 2 / N_DRAWS: small enough for Holm's correction over hundreds of pairs.
N_DRAWS = 10_000
SIGNIFICANCE_LEVEL = 0.05
# Draws that are scored at once; with many classes, all at once would need gigabytes.
DRAWS_PER_BATCH = 1000
# Protocol of models whose backbones are not trained. The models of all other protocols are trained networks.
FROZEN = "frozen"
SUMMARY_COLUMNS = [
    "dataset", "model", "kind", "protocol", "metric", "mean", "std", "low", "high", "val_mean", "runs", "n_test",
    "weights", "head", "learning_rate", "weight_decay", "task", "classes",
]  # fmt: skip


# Paired bootstrap on one test set


class Verdict(StrEnum):
    """Result of a comparison at `SIGNIFICANCE_LEVEL`."""

    BETTER = "better"
    WORSE = "worse"
    NOT_SIGNIFICANT = "no significant difference"


@dataclass(frozen=True)
class BootstrapSamples:
    """Bootstrap distribution of a model's score.

    Attributes:
        score: mean over seeds of the score on the whole test set.
        over_samples: mean score over resampled test samples, with the seeds fixed, (draw,).
        over_seeds: mean score over resampled seeds, with the test samples fixed, (draw,).
        over_both: mean score over resampled test samples and seeds, (draw,).
    """

    score: float
    over_samples: np.ndarray
    over_seeds: np.ndarray
    over_both: np.ndarray


# Lowest and highest score of each dataset's scale.
ScoreRanges = Mapping[str, Sequence[float]]
# Bootstrap samples by dataset and model.
Draws = Mapping[tuple[str, str], BootstrapSamples]


@dataclass(frozen=True)
class PairedDifference:
    """Score of one model minus that of another, with 95 % intervals.

    Attributes:
        samples_interval: over test samples, with the seeds fixed.
        seeds_interval: over seeds, with the test samples fixed.
        interval: over test samples and seeds; the verdict depends on it, and the two-sided p-value.
    """

    difference: float
    samples_interval: tuple[float, float]
    seeds_interval: tuple[float, float]
    interval: tuple[float, float]
    p_value: float

    @property
    def verdict(self) -> Verdict:
        low, high = self.interval
        if low > 0:
            return Verdict.BETTER
        return Verdict.WORSE if high < 0 else Verdict.NOT_SIGNIFICANT


@dataclass(frozen=True)
class GainRecovered:
    """How much of its teacher's gain over the supervised baseline a distilled student recovers.

    Attributes:
        fraction: student gain divided by teacher gain; NaN unless the teacher is significantly better.
        interval: 95 % interval of the fraction over test samples and seeds.
    """

    student_gain: PairedDifference
    teacher_gain: PairedDifference
    fraction: float
    interval: tuple[float, float]


def bootstrap(task: Task, counts: np.ndarray, stream: int = 0) -> BootstrapSamples:
    """Resample the test samples and the seeds of one model.

    Every draw uses the same test samples for all seeds, and for all models of one test set.

    Args:
        counts: (seed, sample, entry), with the samples in the same order for all models; see pipeline/tasks.py.
        stream: number of the model. Different numbers make the resampling of the seeds independent.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
    """
    n_seeds, n_samples, n_cells = counts.shape
    # float64 is exact for counts, and its matrix product is much faster than that of integers.
    flat_counts = counts.transpose(1, 0, 2).reshape(n_samples, -1).astype(np.float64)
    generator, batches = np.random.default_rng(0), []
    for _ in range(N_DRAWS // DRAWS_PER_BATCH):
        indices = generator.integers(n_samples, size=(DRAWS_PER_BATCH, n_samples))
        multiplicity = np.stack([np.bincount(row, minlength=n_samples) for row in indices])
        batches.append(task.score((multiplicity @ flat_counts).reshape(DRAWS_PER_BATCH, n_seeds, n_cells)))
    resampled = np.concatenate(batches)
    observed = task.score(counts.sum(axis=1))
    seeds = np.random.default_rng([1, stream]).integers(n_seeds, size=(N_DRAWS, n_seeds))
    return BootstrapSamples(
        score=float(observed.mean()),
        over_samples=resampled.mean(axis=1),
        over_seeds=observed[seeds].mean(axis=1),
        over_both=np.take_along_axis(resampled, seeds, axis=1).mean(axis=1),
    )


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the bounds of the middle 95 % of bootstrap values."""
    low, high = np.quantile(values, [SIGNIFICANCE_LEVEL / 2, 1 - SIGNIFICANCE_LEVEL / 2])
    return float(low), float(high)


def paired_difference(model: BootstrapSamples, reference: BootstrapSamples) -> PairedDifference:
    """Compare a model with a reference: score of the model minus score of the reference."""
    differences = model.over_both - reference.over_both
    # Twice the smaller tail. One is added, because the observed test set is itself a possible draw.
    tail = 1 + min((differences <= 0).sum(), (differences >= 0).sum())
    return PairedDifference(
        difference=model.score - reference.score,
        samples_interval=percentile_interval(model.over_samples - reference.over_samples),
        seeds_interval=percentile_interval(model.over_seeds - reference.over_seeds),
        interval=percentile_interval(differences),
        p_value=float(min(1.0, 2 * tail / (len(differences) + 1))),
    )


def gain_recovered(student: BootstrapSamples, baseline: BootstrapSamples, teacher: BootstrapSamples) -> GainRecovered:
    """Compare a distilled student with its supervised baseline, and with its frozen teacher."""
    student_gain, teacher_gain = paired_difference(student, baseline), paired_difference(teacher, baseline)
    if teacher_gain.verdict != Verdict.BETTER:
        return GainRecovered(student_gain, teacher_gain, np.nan, (np.nan, np.nan))
    fractions = (student.over_both - baseline.over_both) / (teacher.over_both - baseline.over_both)
    fraction = student_gain.difference / teacher_gain.difference
    return GainRecovered(student_gain, teacher_gain, fraction, percentile_interval(fractions))


def holm_adjusted(p_values: np.ndarray) -> np.ndarray:
    """Adjust p-values for multiple comparisons by Holm's method.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6, 1979.
    """
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


# Summaries of runs


class ModelKind(StrEnum):
    """Kind of a model, as shown in the report."""

    ENSEMBLE = "ensemble"
    PRETRAINED = "pretrained"
    RANDOM = "random weights (control)"
    BAND_STATISTICS = "band statistics (control)"
    AVERAGE = "average of probabilities (control)"
    FINE_TUNED = "fine-tuned"
    STUDENT = "student"


CONTROLS = (ModelKind.RANDOM, ModelKind.BAND_STATISTICS, ModelKind.AVERAGE)
# Appended to the name of an ensemble to name the average of its members' probabilities.
AVERAGE_SUFFIX = ", averaged"


def model_kind(model: str, weights: str, protocol: str) -> ModelKind:
    """Return the kind of a model; `weights` as in runs.csv: `none`, or with `random` if random."""
    if protocol.startswith("fine-tuned"):
        return ModelKind.FINE_TUNED
    if protocol != FROZEN:
        return ModelKind.STUDENT
    if model.endswith(AVERAGE_SUFFIX):
        return ModelKind.AVERAGE
    if "random" in weights:
        return ModelKind.RANDOM
    if weights == "none":
        return ModelKind.BAND_STATISTICS
    return ModelKind.ENSEMBLE if "+" in model else ModelKind.PRETRAINED


def summarize_runs(runs: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """Summarize the runs of each model on each dataset; see `protocol.train_and_test` for the runs.

    Columns, among others: mean; std, over seeds (NaN for one run); low and high, the 95 % bootstrap interval of the
    mean over test samples.
    """
    runs = runs.assign(head=runs["head"].fillna("–") if "head" in runs else "–")  # students have none
    groups = runs.groupby(["dataset", "model"], sort=False)
    summary = groups.first()
    summary["mean"], summary["std"], summary["runs"] = groups.score.mean(), groups.score.std(), groups.size()
    summary["val_mean"] = groups.val_score.mean()
    summary[["low", "high"]] = [percentile_interval(draws[key].over_samples) for key in summary.index]
    summary = summary.reset_index()
    kinds = map(model_kind, summary.model, summary.weights, summary.protocol)
    return summary.assign(kind=[kind.value for kind in kinds])[SUMMARY_COLUMNS]


# Summaries over datasets


def normalized_scores(runs: pd.DataFrame, score_ranges: ScoreRanges) -> pd.Series:
    """Scale scores so that the lower bound of each dataset's range is 0 and the upper is 1.

    Without a range, the bounds are the worst and the best run of all models but controls, whose scores can thus lie
    outside of 0 to 1. Fewer than two such models do not span a scale; then the controls count too.
    """
    kinds = map(model_kind, runs.model, runs.weights, runs.protocol)
    rated = runs[[kind not in CONTROLS for kind in kinds]]
    rated = rated[rated.groupby("dataset").model.transform("nunique") > 1]
    rated = pd.concat([rated, runs[~runs.dataset.isin(rated.dataset)]])
    bounds = rated.groupby("dataset").score.agg(["min", "max"])
    for dataset, score_range in score_ranges.items():
        bounds.loc[dataset] = score_range
    low, high = (runs.dataset.map(bounds[name]) for name in ("min", "max"))
    return (runs.score - low) / (high - low).where(high > low, 1)


def aggregate_over_datasets(
    runs: pd.DataFrame, datasets: Sequence[str], score_ranges: ScoreRanges = MappingProxyType({})
) -> pd.DataFrame:
    """Compute the interquartile mean over the runs of every model that ran on all `datasets`, best first.

    Columns: model, iqm, low, high (95 % interval over seeds, resampled within each dataset).

    Args:
        score_ranges: GEO-Bench's range of the scores of a dataset, where it is known; see `normalized_scores`.
    """
    runs = runs.assign(normalized=normalized_scores(runs, score_ranges))
    runs, rows = runs[runs.dataset.isin(datasets)], []
    for model, table in runs.groupby("model", sort=False):
        scores = [group.normalized.to_numpy() for _, group in table.groupby("dataset", sort=True)]
        if len(scores) < len(datasets):
            continue
        # The same seed for each model, so that its interval does not depend on the other models.
        generator = np.random.default_rng(0)
        resampled = [values[generator.integers(len(values), size=(N_DRAWS, len(values)))] for values in scores]
        low, high = percentile_interval(trim_mean(np.concatenate(resampled, axis=1), 0.25, axis=1))
        iqm = float(trim_mean(np.concatenate(scores), 0.25))
        rows.append({"model": model, "iqm": iqm, "low": low, "high": high})
    return pd.DataFrame(rows, columns=["model", "iqm", "low", "high"]).sort_values(
        "iqm", ascending=False, kind="stable", ignore_index=True
    )


def common_dataset_groups(runs: pd.DataFrame) -> list[list[str]]:
    """List the groups of at least two datasets on which models ran, the largest first.

    A model that was skipped on a dataset cannot be compared over it, so each group has its own table.
    """
    datasets_of_model = runs.groupby("model", sort=False).dataset.agg(lambda names: tuple(dict.fromkeys(names)))
    groups = {datasets for datasets in datasets_of_model if len(datasets) > 1}
    return [list(datasets) for datasets in sorted(groups, key=lambda datasets: (-len(datasets), datasets))]
