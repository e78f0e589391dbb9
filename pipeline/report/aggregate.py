"""Summaries of runs: scores of each model on each dataset, and over several datasets as in GEO-Bench.

Sources: Lacoste et al., GEO-Bench, NeurIPS 2023, arXiv 2306.03831 (scores of each dataset scaled linearly between its
worst and its best run; bootstrap over seeds, stratified by dataset); Agarwal et al., Deep Reinforcement Learning at
the Edge of the Statistical Precipice, NeurIPS 2021, arXiv 2108.13264 (interquartile mean).
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum

import numpy as np
import pandas as pd
from scipy.stats import trim_mean

from pipeline.report.significance import N_DRAWS, BootstrapSamples, percentile_interval

# Protocol of models whose backbones are not trained. The models of all other protocols are trained networks.
FROZEN = "frozen"


class ModelKind(StrEnum):
    """Kind of a model, as shown in the report."""

    ENSEMBLE = "ensemble"
    PRETRAINED = "pretrained"
    RANDOM = "random weights (control)"
    BAND_STATISTICS = "band statistics (control)"
    FINE_TUNED = "fine-tuned"
    STUDENT = "student"


def model_kind(model: str, weights: str, protocol: str = FROZEN) -> ModelKind:
    """Return the kind of a model.

    Args:
        model: its name; the members of an ensemble are joined by `+`.
        weights: of its backbones, as in runs.csv: `none` if they have none; contains `random` if they are random.
    """
    if protocol.startswith("fine-tuned"):
        return ModelKind.FINE_TUNED
    if protocol != FROZEN:
        return ModelKind.STUDENT
    if "random" in weights:
        return ModelKind.RANDOM
    if weights == "none":
        return ModelKind.BAND_STATISTICS
    return ModelKind.ENSEMBLE if "+" in model else ModelKind.PRETRAINED


def summarize_runs(runs: pd.DataFrame, draws: Mapping[tuple[str, str], BootstrapSamples]) -> pd.DataFrame:
    """Summarize the runs of each model on each dataset.

    Args:
        runs: one row per run; see `protocol.train_and_test`.
        draws: bootstrap samples of each (dataset, model).

    Returns:
        One row per dataset and model. Columns, among others: mean; std, over seeds (NaN for one run); low and high,
        the 95 % bootstrap interval of the mean over test samples.
    """
    rows = []
    for (dataset, model), group in runs.groupby(["dataset", "model"], sort=False):
        first = group.iloc[0]
        low, high = percentile_interval(draws[dataset, model].over_samples)
        rows.append(
            {
                "dataset": dataset,
                "model": model,
                "kind": model_kind(model, first.weights, first.protocol).value,
                "protocol": first.protocol,
                "metric": first.metric,
                "mean": group.score.mean(),
                "std": group.score.std(ddof=1) if len(group) > 1 else float("nan"),
                "low": low,
                "high": high,
                "val_mean": group.val_score.mean(),
                "runs": len(group),
                "n_test": first.n_test,
                "weights": first.weights,
                "head": _head(first),
                "learning_rate": first.learning_rate,
                "weight_decay": first.weight_decay,
                "task": first.task,
                "classes": first.classes,
            }
        )
    return pd.DataFrame(rows)


def _head(run: pd.Series) -> str:
    """Return the description of a run's head; students have none."""
    head = run.get("head")
    return head if isinstance(head, str) else "–"


def min_max_normalized(runs: pd.DataFrame) -> pd.Series:
    """Scale scores so that the worst run of each dataset is 0 and the best is 1.

    Args:
        runs: one row per run, with `dataset`, `model` and `score`. All models in it determine the scale.
    """
    scores = runs.groupby("dataset").score
    low, high = scores.transform("min"), scores.transform("max")
    return (runs.score - low) / (high - low).where(high > low, 1)


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean of the middle half of the values along the last axis."""
    return trim_mean(values, 0.25, axis=-1)


def aggregate_over_datasets(runs: pd.DataFrame, datasets: Sequence[str]) -> pd.DataFrame:
    """Compute the interquartile mean over runs and datasets of every model that ran on all `datasets`.

    Returns:
        One row per model, best first. Columns: model, iqm, low, high (95 % interval over seeds, resampled within each
        dataset).
    """
    runs = runs.assign(normalized=min_max_normalized(runs))
    runs, rows = runs[runs.dataset.isin(datasets)], []
    for model, table in runs.groupby("model", sort=False):
        scores = [group.normalized.to_numpy() for _, group in table.groupby("dataset", sort=True)]
        if len(scores) < len(datasets):
            continue
        # The same seed for each model, so that its interval does not depend on the other models.
        generator = np.random.default_rng(0)
        resampled = [values[generator.integers(len(values), size=(N_DRAWS, len(values)))] for values in scores]
        low, high = percentile_interval(interquartile_mean(np.concatenate(resampled, axis=1)))
        iqm = float(interquartile_mean(np.concatenate(scores)))
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
