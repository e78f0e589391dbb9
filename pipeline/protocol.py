"""The paper's protocol on one cell, a data set seen through a model: search on validation, then seeds on test."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch

from pipeline import metrics, params, predictions
from pipeline.cells import Cell
from pipeline.fit import Setting
from pipeline.search import search

# Whose figures these are: backbones frozen, features from the cache. A fine-tuned model would be another protocol.
PROTOCOL = "frozen"


def tune(cell: Cell, described: params.Search, name: str) -> dict:
    """Search learning rate and weight decay on the validation split; see `search`.

    Args:
        name: for the line that says how far it is.
    """

    def score(settings):
        counts = cell.counts(cell.train(settings), "val")
        scores = metrics.score(cell.task.kind, counts.sum(axis=1), cell.task.classes)
        print(f"{name}: {len(settings)} trials, best on validation {scores.max():.4f}", flush=True)
        return scores

    return search(score, described)


def test(cell: Cell, best: Mapping[str, float], seeds: int, told: Mapping) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train `seeds` heads at the best setting and read the test split, once for each.

    Args:
        told: what else each run's row says, such as its data set and model.

    Returns:
        runs, one row a seed; and predictions, one row a seed and test sample (pipeline/predictions.py).
    """
    group = cell.train([Setting(**best, seed=seed) for seed in range(seeds)])
    task, part = cell.task, cell.parts["test"]
    validation = metrics.score(task.kind, cell.counts(group, "val").sum(axis=1), task.classes)
    if task.kind == "segmentation":
        predicted = predictions.of_masks(part.sample, cell.counts(group, "test"))
    else:
        logits = _logits(group, part.inputs, cell.batch)
        predicted = predictions.of_samples(part.sample, part.label.cpu().numpy(), logits, task.kind)
    _, counts = predictions.counts(predicted, task.kind, task.classes)
    tested = metrics.score(task.kind, counts.sum(axis=1), task.classes)
    runs = [
        {**told, "protocol": PROTOCOL, "task": task.kind, "seed": seed, "metric": metrics.METRICS[task.kind],
         "score": tested[seed], "val_score": validation[seed], "n_test": len(part.sample), "classes": task.classes,
         **best}
        for seed in range(seeds)
    ]  # fmt: skip
    return pd.DataFrame(runs), predicted


@torch.inference_mode()
def _logits(group: torch.nn.Module, inputs: torch.Tensor, batch: int) -> np.ndarray:
    """(head, sample, class) of every head."""
    heads, parts = len(group.heads), []
    for start in range(0, len(inputs), batch):
        rows = torch.arange(start, min(start + batch, len(inputs)), device=inputs.device)
        parts.append(torch.cat([piece for _, piece in group.pieces(inputs, rows.expand(heads, -1))]).float().cpu())
    return torch.cat(parts, dim=1).numpy()
