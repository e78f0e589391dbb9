"""What every seed said of every test sample, as one table, so that every figure can be recomputed.

Of classification: the class or classes said, the true ones, and the probabilities. Of segmentation: the confusion
matrix of each mask, which holds all that its scores and their resampling need at a thousandth of the masks' size.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pipeline import metrics
from pipeline.errors import UserError

# What holds the heads' learning rate and weight decay down.
BOUNDS = "search.learning_rate, search.weight_decay"


def of_samples(
    samples: list[str], label: np.ndarray, logits: np.ndarray, kind: str, bounds: str = BOUNDS
) -> pd.DataFrame:
    """One row a seed and sample: seed, sample, label, predicted, probability.

    Args:
        label: (sample,) or, multi-label, (sample, class).
        logits: (seed, sample, class).
        bounds: as for `diverged`.

    Raises:
        UserError: some are no numbers.
    """
    if wrong := [seed for seed, one in enumerate(logits) if not np.isfinite(one).all()]:
        raise UserError(diverged(wrong, len(logits), bounds))
    logits = logits.astype(np.float64)
    if kind == "multilabel":
        predicted = (logits > 0).astype(np.int64)
        probability = 1 / (1 + np.exp(-logits))
    else:
        predicted = logits.argmax(axis=2)
        probability = np.exp(logits - logits.max(axis=2, keepdims=True))
        probability /= probability.sum(axis=2, keepdims=True)
    probability = probability.astype(np.float32)
    return pd.DataFrame(
        [
            {"seed": seed, "sample": name, "label": true, "predicted": said, "probability": chance}
            for seed in range(len(logits))
            for name, true, said, chance in zip(samples, label, predicted[seed], probability[seed], strict=True)
        ]
    )


def diverged(seeds: Sequence[int], count: int, bounds: str = BOUNDS) -> str:
    """What to say of trainings that ended in no numbers, and what to do.

    Args:
        seeds: theirs, of `count`.
        bounds: the parameters that hold learning rate and weight decay down.
    """
    return (
        f"The training diverged with {len(seeds)} of {count} seeds ({', '.join(map(str, seeds))}), at the learning "
        f"rate and weight decay that did best on validation. Allow only smaller ones: {bounds}."
    )


def of_masks(samples: list[str], counts: np.ndarray) -> pd.DataFrame:
    """One row a seed and sample: seed, sample, counts (true class x predicted class, flattened).

    Args:
        counts: (seed, sample, cells); see pipeline/metrics.
    """
    return pd.DataFrame(
        [
            {"seed": seed, "sample": name, "counts": row}
            for seed, of_seed in enumerate(counts)
            for name, row in zip(samples, of_seed, strict=True)
        ]
    )


def counts(table: pd.DataFrame, kind: str, classes: int) -> tuple[list[str], np.ndarray]:
    """Names of the samples, sorted, and the counts (seed, sample, cells) that the table stands for."""
    table = table.sort_values(["seed", "sample"], kind="stable")
    seeds = table.seed.nunique()
    samples = table["sample"].iloc[: len(table) // seeds].tolist()
    if "counts" in table:
        each = np.stack(table.counts)
    else:
        predicted, label = (np.stack(table[name]) for name in ("predicted", "label"))
        each = metrics.counts(kind, predicted, label, classes, None)
    return samples, each.reshape(seeds, len(samples), -1)
