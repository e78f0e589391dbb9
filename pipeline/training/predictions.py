"""Evaluate trained heads, and write tables of predictions.

Tables have every seed on every test sample, so that every figure can be recomputed. For classification and
multi-label tasks a row has the prediction, the label and the probabilities. For segmentation it has the confusion
matrix of the mask: enough for its scores and their resampling, at a thousandth of the size.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from pipeline.errors import UserError
from pipeline.heads.config import HeadGroup
from pipeline.tasks import Task, counts_from_table
from pipeline.training.feature_loader import SplitData, StreamedFeatures
from pipeline.training.parallel import parallel_map

# Keys of params.yaml that bound the heads' learning rate and weight decay.
SEARCH_KEYS = "search.learning_rate, search.weight_decay"
# Samples per evaluation batch of stacked heads, which are one matrix product.
STACKED_BATCH = 4096


def evaluate(group: HeadGroup, data: SplitData, task: Task, batch: int) -> np.ndarray:
    """Count hits and errors of every head and sample, int64 (head, sample, entry) (pipeline/tasks.py)."""
    return np.concatenate(evaluate_groups(group.independent_heads(), data, task, batch))


def evaluate_groups(groups: Sequence[HeadGroup], data: SplitData, task: Task, batch: int) -> list[np.ndarray]:
    """Evaluate several groups as `evaluate` does; streamed features are read once for all groups."""
    with parallel_map(data, groups[0]) as map_parallel:
        if not isinstance(data.inputs, StreamedFeatures):
            return list(map_parallel(lambda group: evaluate_in_memory(group, data, task, batch), groups))
        parts, rows = [], torch.arange(len(data.label)).split(batch)
        for index, inputs in zip(rows, data.inputs.batches(rows), strict=True):
            label = data.label[index.to(data.label.device)]
            parts.append(list(map_parallel(lambda group, x=inputs, y=label: _count(group, x, y, task), groups)))
    return [np.concatenate(counts, axis=1) for counts in zip(*parts, strict=True)]


def evaluate_in_memory(group: HeadGroup, data: SplitData, task: Task, batch: int) -> np.ndarray:
    """Count hits and errors of a group on features in memory, int64 (head, sample, entry)."""
    size = STACKED_BATCH if group.is_stacked else batch
    rows = [slice(start, start + size) for start in range(0, len(data.label), size)]
    counts = [_count(group, select_rows(data.inputs, part), data.label[part], task) for part in rows]
    return np.concatenate(counts, axis=1)


@torch.no_grad()
def predict_logits(group: HeadGroup, inputs: torch.Tensor | StreamedFeatures) -> np.ndarray:
    """Return logits on pooled features, float32 (head, sample, class)."""
    rows = torch.arange(len(inputs)).split(STACKED_BATCH)
    batches = inputs.batches(rows) if isinstance(inputs, StreamedFeatures) else inputs.split(STACKED_BATCH)
    parts = [torch.cat([logits for _, logits in group.forward_heads(batch, None)]).float().cpu() for batch in batches]
    return torch.cat(parts, dim=1).numpy()


@torch.no_grad()
def diverged_heads(group: HeadGroup) -> np.ndarray:
    """Return which heads have non-finite parameters or running statistics, bool (head,)."""
    diverged = []
    for independent in group.independent_heads():
        values = [value for value in independent.state_dict().values() if value.is_floating_point()]
        n_heads = len(independent) if group.is_stacked else 1
        finite = torch.stack([value.isfinite().reshape(n_heads, -1).all(dim=1) for value in values]).all(dim=0)
        diverged.append(~finite)
    return torch.cat(diverged).cpu().numpy()


def select_rows(inputs, index: torch.Tensor | slice) -> torch.Tensor | list[torch.Tensor]:
    return inputs[index] if isinstance(inputs, torch.Tensor) else [level[index] for level in inputs]


@torch.no_grad()
def _count(group: HeadGroup, inputs, label: torch.Tensor, task: Task) -> np.ndarray:
    """Counts on one batch, (head, sample, entry); the group stays in training or evaluation mode."""
    was_training = group.training
    group.eval()
    logits = torch.cat([logits for _, logits in group.forward_heads(inputs, None)])
    group.train(was_training)
    predicted = task.predict_labels(logits, label, dim=2).cpu().numpy()
    actual = label.long().cpu().numpy()
    return np.stack([task.counts(labels, actual) for labels in predicted])


def prediction_table(
    samples: Sequence[str], label: np.ndarray, logits: np.ndarray, task: Task, search_keys: str = SEARCH_KEYS
) -> pd.DataFrame:
    """Return one row per seed and sample: seed, sample, label, predicted, probability.

    Args:
        label: (sample,), or, multi-label, (sample, class).
        logits: (seed, sample, class); UserError if some are non-finite.
        search_keys: as for `divergence_error`.
    """
    if diverged := [seed for seed, values in enumerate(logits) if not np.isfinite(values).all()]:
        raise divergence_error(diverged, len(logits), search_keys)
    logits = logits.astype(np.float64)
    predicted = task.predict(logits, axis=2)
    probability = task.probabilities(logits, axis=2).astype(np.float32)
    columns = {
        "label": list(label) * len(logits),
        "predicted": list(predicted.reshape(-1, *predicted.shape[2:])),
        "probability": list(probability.reshape(-1, probability.shape[2])),
    }
    return _table(samples, len(logits), columns)


def confusion_table(samples: Sequence[str], counts: np.ndarray) -> pd.DataFrame:
    """Return one row per seed and sample: seed, sample, counts; from counts (seed, sample, entry)."""
    return _table(samples, len(counts), {"counts": list(counts.reshape(-1, counts.shape[2]))})


def _table(samples: Sequence[str], n_seeds: int, columns: dict[str, list]) -> pd.DataFrame:
    seeds = np.arange(n_seeds).repeat(len(samples))
    return pd.DataFrame({"seed": seeds, "sample": list(samples) * n_seeds, **columns})


def tabulate(
    samples: Sequence[str], label: np.ndarray, outputs: np.ndarray, task: Task, search_keys: str = SEARCH_KEYS
) -> tuple[pd.DataFrame, np.ndarray]:
    """Return the table and the scores (seed,) of test `outputs`: logits, or counts if dense."""
    if task.is_dense:
        table = confusion_table(samples, outputs)
    else:
        table = prediction_table(samples, label, outputs, task, search_keys)
    return table, task.score(counts_from_table(table, task)[1].sum(axis=1))


def divergence_error(seeds: Sequence[int], n_seeds: int, search_keys: str = SEARCH_KEYS) -> UserError:
    """Return the error for seeds that ended non-finite; `search_keys` bound their hyperparameters."""
    return UserError(
        f"The training diverged with {len(seeds)} of {n_seeds} seeds ({', '.join(map(str, seeds))}), at the learning "
        f"rate and weight decay of the best validation score. Set smaller upper bounds: {search_keys}.",
        key=search_keys,
        value=[int(seed) for seed in seeds],
    )
