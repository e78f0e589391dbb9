"""The paper's protocol on one cell, a data set seen through a model: search on validation, then seeds on test."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pipeline import config, metrics
from pipeline.errors import UserError
from pipeline.heads.config import describe_head
from pipeline.training import loop, predictions
from pipeline.training.loop import HParams
from pipeline.training.search import search
from pipeline.training.task_data import TaskData

# Whose figures these are: backbones frozen, features from the cache. A fine-tuned model would be another protocol.
PROTOCOL = "frozen"


@dataclass(frozen=True)
class ProtocolResult:
    """Seeds that were read on the test split.

    Attributes:
        runs: one row a seed.
        predicted: one row a seed and test sample (pipeline/training/predictions.py).
        group: the trained heads.
        best: the place in it of the one with the best score on validation.
    """

    runs: pd.DataFrame
    predicted: pd.DataFrame
    group: torch.nn.Module
    best: int


def tune(
    cell: TaskData, described: config.SearchConfig, name: str, study: Path | None = None, about: object = None
) -> dict:
    """Search learning rate and weight decay on the validation split.

    Args:
        name: for the line that says how far it is.
        study, about: as for `search`.
    """

    def score(settings):
        group = cell.train(settings)
        scores = metrics.score(cell.task.type, cell.counts(group, "val").sum(axis=1), cell.task.n_classes)
        print(f"{name}: {len(settings)} trials, best on validation {scores.max():.4f}", flush=True)
        return np.where(loop.diverged_heads(group), np.nan, scores)

    return search(score, described, study, about)


def test(cell: TaskData, best: Mapping[str, float], seeds: int, told: Mapping) -> ProtocolResult:
    """Train `seeds` heads at the best setting and read the test split, once for each.

    Args:
        told: what else each run's row says, such as its data set and model.

    Returns:
        every run, what was predicted, and the heads.

    Raises:
        UserError: heads diverged.
    """
    group = cell.train([HParams(**best, seed=seed) for seed in range(seeds)])
    if (wrong := loop.diverged_heads(group)).any():
        raise UserError(predictions.diverged(np.flatnonzero(wrong), seeds))
    task, part = cell.task, cell.parts["test"]
    validation = metrics.score(task.type, cell.counts(group, "val").sum(axis=1), task.n_classes)
    if task.type == "segmentation":
        predicted = predictions.of_masks(part.sample, cell.counts(group, "test"))
    else:
        label = part.label.cpu().numpy()
        predicted = predictions.of_samples(part.sample, label, cell.logits(group, "test"), task.type)
    _, counts = predictions.counts(predicted, task.type, task.n_classes)
    tested = metrics.score(task.type, counts.sum(axis=1), task.n_classes)
    runs = [
        {**told, "protocol": PROTOCOL, "head": describe_head(cell.blueprint, cell.fields, bool(task.class_weights)),
         "task": task.type, "seed": seed, "metric": metrics.METRICS[task.type], "score": tested[seed],
         "val_score": validation[seed], "n_test": len(part.sample), "classes": task.n_classes,
         **best}
        for seed in range(seeds)
    ]  # fmt: skip
    return ProtocolResult(pd.DataFrame(runs), predicted, group, int(validation.argmax()))
