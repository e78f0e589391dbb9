"""Further metrics, and the scores of every class, from the stored predictions of all seeds.

A class that the test labels lack has no score (docs/decisions/absent-classes.md).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pipeline.tasks import Task

# Columns of the scores of a class: attributes of `tasks.ClassCounts`.
CLASS_METRICS = ("iou", "f1", "recall", "precision")
MEAN_AVERAGE_PRECISION = "mean average precision"


def metric_table(task: Task, counts: np.ndarray, average_precision: np.ndarray | None = None) -> pd.DataFrame:
    """Return a row per metric, first that of the task: metric, mean and std over seeds (NaN for one seed).

    Args:
        counts: (seed, sample, entry); see pipeline/tasks.py.
        average_precision: of every class, (seed, class), NaN for absent classes; for its mean over classes.
    """
    total = counts.sum(axis=1)
    values = {metric: task.score(total, metric) for metric in (task.metric, *task.further_metrics)}
    if average_precision is not None:
        values[MEAN_AVERAGE_PRECISION] = np.nanmean(average_precision, axis=1)
    rows = [{"metric": metric, "mean": scores.mean(), "std": _std(scores)} for metric, scores in values.items()]
    return pd.DataFrame(rows)


def class_table(
    task: Task, counts: np.ndarray, names: Sequence[str], average_precision: np.ndarray | None = None
) -> pd.DataFrame:
    """Return a row per class; arguments as for `metric_table`.

    Columns: class; support, the number of its test labels; predicted, the mean number of predictions over seeds; and
    the mean and, as <column>_std, the standard deviation over seeds of iou, f1, recall, precision and, multi-label,
    average_precision. An absent class has NaN.
    """
    scores = task.class_counts(counts.sum(axis=1))
    is_present = scores.support[0] > 0
    columns = {name: getattr(scores, name) for name in CLASS_METRICS}
    if average_precision is not None:
        columns["average_precision"] = average_precision
    table = pd.DataFrame({"class": names, "support": scores.support[0], "predicted": scores.predicted.mean(axis=0)})
    for name, values in columns.items():
        table[name] = np.where(is_present, values.mean(axis=0), np.nan)
        table[f"{name}_std"] = np.where(is_present, _std(values), np.nan)
    return table


def average_precision(predicted: pd.DataFrame) -> np.ndarray:
    """Compute average precision from a table of multi-label predictions.

    Returns:
        (seed, class), NaN for absent classes. Source: scikit-learn's average_precision_score.
    """
    from sklearn.metrics import average_precision_score  # takes 1 s to import; most reports need none

    scores = []
    for _, table in predicted.groupby("seed"):
        label, probability = np.stack(table.label), np.stack(table.probability)
        pairs = zip(label.T, probability.T, strict=True)
        scores.append([average_precision_score(*pair) if pair[0].any() else np.nan for pair in pairs])
    return np.array(scores)


def _std(values: np.ndarray) -> np.ndarray:
    """Standard deviation over seeds, the first axis; NaN for one seed."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)
