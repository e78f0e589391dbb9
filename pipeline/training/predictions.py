"""Tables of predictions: every seed on every test sample, so that every figure can be recomputed.

For classification and multi-label tasks a row has the prediction, the label and the probabilities. For segmentation
it has the confusion matrix of the mask: enough for its scores and their resampling, at a thousandth of the size.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pipeline.errors import UserError
from pipeline.tasks import Task

# Keys of params.yaml that bound the heads' learning rate and weight decay.
SEARCH_KEYS = "search.learning_rate, search.weight_decay"


def prediction_table(
    samples: Sequence[str], label: np.ndarray, logits: np.ndarray, task: Task, search_keys: str = SEARCH_KEYS
) -> pd.DataFrame:
    """Return one row per seed and sample: seed, sample, label, predicted, probability.

    Args:
        samples: names of the samples.
        label: (sample,), or, multi-label, (sample, class).
        logits: (seed, sample, class).
        search_keys: as for `divergence_message`.

    Raises:
        UserError: some logits are non-finite.
    """
    if diverged := [seed for seed, values in enumerate(logits) if not np.isfinite(values).all()]:
        raise divergence_error(diverged, len(logits), search_keys)
    logits = logits.astype(np.float64)
    predicted = task.predict(logits, axis=2)
    probability = task.probabilities(logits, axis=2).astype(np.float32)
    return pd.DataFrame(
        [
            {
                "seed": seed,
                "sample": samples[index],
                "label": label[index],
                "predicted": predicted[seed, index],
                "probability": probability[seed, index],
            }
            for seed in range(len(logits))
            for index in range(len(samples))
        ]
    )


def divergence_error(seeds: Sequence[int], n_seeds: int, search_keys: str = SEARCH_KEYS) -> UserError:
    """Return the error for trainings that ended with non-finite values.

    Args:
        seeds: seeds that diverged, of `n_seeds`.
        search_keys: keys of params.yaml that bound learning rate and weight decay.
    """
    return UserError(
        f"The training diverged with {len(seeds)} of {n_seeds} seeds ({', '.join(map(str, seeds))}), at the learning "
        f"rate and weight decay of the best validation score. Set smaller upper bounds: {search_keys}.",
        key=search_keys,
        value=[int(seed) for seed in seeds],
    )


def confusion_table(samples: Sequence[str], counts: np.ndarray) -> pd.DataFrame:
    """Return one row per seed and sample: seed, sample, counts (a flattened confusion matrix).

    Args:
        samples: names of the samples.
        counts: (seed, sample, cell); see pipeline/metrics.py.
    """
    return pd.DataFrame(
        [
            {"seed": seed, "sample": name, "counts": row}
            for seed, rows in enumerate(counts)
            for name, row in zip(samples, rows, strict=True)
        ]
    )


def counts_from_table(table: pd.DataFrame, task: Task) -> tuple[list[str], np.ndarray]:
    """Compute the counts of a table of predictions.

    Returns:
        Names of the samples, sorted, and their counts (seed, sample, cell); see pipeline/metrics.py.
    """
    table = table.sort_values(["seed", "sample"], kind="stable")
    n_seeds = table.seed.nunique()
    samples = table["sample"].iloc[: len(table) // n_seeds].tolist()
    if "counts" in table:
        counts = np.stack(table.counts)
    else:
        predicted, label = (np.stack(table[name]) for name in ("predicted", "label"))
        counts = task.counts(predicted, label)
    return samples, counts.reshape(n_seeds, len(samples), -1)
