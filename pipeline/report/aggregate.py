"""One figure for several data sets, as GEO-Bench does: normalised scores and their interquartile mean.

Sources: Lacoste et al., GEO-Bench, NeurIPS 2023, arXiv 2306.03831 (scores of each data set scaled linearly between
its worst and its best run; bootstrap over seeds, stratified by data set); Agarwal et al., Deep Reinforcement Learning
at the Edge of the Statistical Precipice, NeurIPS 2021, arXiv 2108.13264 (the interquartile mean).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import trim_mean

from pipeline.report.significance import N_DRAWS, percentile_interval


def min_max_normalized(runs: pd.DataFrame) -> pd.Series:
    """Scores scaled so that the worst run of each data set is 0 and its best is 1.

    Args:
        runs: one row a run: `dataset`, `model`, `score`. Which models are in it sets the scale.
    """
    by_set = runs.groupby("dataset").score
    low, high = by_set.transform("min"), by_set.transform("max")
    return (runs.score - low) / (high - low).where(high > low, 1)


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half of the values, along the last axis."""
    return trim_mean(values, 0.25, axis=-1)


def aggregate_over_datasets(runs: pd.DataFrame, datasets: Sequence[str]) -> pd.DataFrame:
    """Interquartile mean over runs and data sets of every model that ran on all of `datasets`.

    Returns:
        model, iqm, low, high (95 % over seeds, drawn anew within each data set), best first.
    """
    runs = runs.assign(normalised=min_max_normalized(runs))
    runs, rows = runs[runs.dataset.isin(datasets)], []
    for model, table in runs.groupby("model", sort=False):
        strata = [group.normalised.to_numpy() for _, group in table.groupby("dataset", sort=True)]
        if len(strata) < len(datasets):
            continue
        # One generator for each model alike, so that a model's interval depends on its own runs alone.
        generator = np.random.default_rng(0)
        drawn = [values[generator.integers(len(values), size=(N_DRAWS, len(values)))] for values in strata]
        low, high = percentile_interval(interquartile_mean(np.concatenate(drawn, axis=1)))
        iqm = float(interquartile_mean(np.concatenate(strata)))
        rows.append({"model": model, "iqm": iqm, "low": low, "high": high})
    return pd.DataFrame(rows, columns=["model", "iqm", "low", "high"]).sort_values(
        "iqm", ascending=False, kind="stable", ignore_index=True
    )


def common_dataset_groups(runs: pd.DataFrame) -> list[list[str]]:
    """The lists of two or more data sets that some models ran on, all of them and no others; the longest first.

    A model cannot be compared over a data set it was left out of, so each list has a table of its own.
    """
    ran = runs.groupby("model", sort=False).dataset.agg(lambda names: tuple(dict.fromkeys(names)))
    distinct = sorted({names for names in ran if len(names) > 1}, key=lambda names: (-len(names), names))
    return [list(names) for names in distinct]
