"""The frozen protocol: search hyperparameters on validation, then score seeds on test.

The backbones are frozen and features come from the cache. Every seed is scored once on the test split.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pipeline.config import SearchConfig
from pipeline.heads.checkpoint import TrainedHead, select_head
from pipeline.heads.config import HeadGroup, describe_head
from pipeline.training import pca, predictions
from pipeline.training.feature_loader import SplitData
from pipeline.training.loop import HParams, fit
from pipeline.training.predictions import diverged_heads, evaluate, predict_logits
from pipeline.training.search import search
from pipeline.training.task_data import TaskData

# Value of the column `protocol` of the runs; fine-tuning and distillation have others.
PROTOCOL = "frozen"


@dataclass(frozen=True)
class ProtocolResult:
    """Trained seeds and their test scores.

    Attributes:
        runs: one row per seed.
        predicted: one row per seed and test sample (pipeline/training/predictions.py).
        group: the trained models of all seeds: a group of heads, or a list of students.
        best_index: index of the model with the best validation score.
    """

    runs: pd.DataFrame
    predicted: pd.DataFrame
    group: Any
    best_index: int


def train_heads(data: TaskData, hparams: Sequence[HParams]) -> HeadGroup:
    """Train one head per hyperparameters; return the group.

    Linear heads are trained in the principal axes of their inputs, and rotated back.
    """

    def rotated(split: SplitData) -> SplitData:
        return replace(split, inputs=pca.rotate(split.inputs, data.rotations)) if data.rotations else split

    validation = rotated(data.splits["val"]) if data.schedule.patience else None
    train = rotated(data.splits["train"])
    group = fit(data.head_config.create_group, train, data.task, hparams, data.schedule, validation)
    if data.rotations:
        pca.rotate_back(group, data.rotations)
    return group


def count_split(data: TaskData, group: HeadGroup, split: str) -> np.ndarray:
    """Count hits and errors of every head on a split, int64 (head, sample, cell); see pipeline/metrics.py."""
    return evaluate(group, data.splits[split], data.task, data.schedule.batch)


def score_split(data: TaskData, group: HeadGroup, split: str) -> np.ndarray:
    """Compute the score of every head on a split, (head,)."""
    return data.task.score(count_split(data, group, split).sum(axis=1))


def trained_head(data: TaskData, model: str, group: HeadGroup, index: int) -> TrainedHead:
    """Return one head of a trained group, ready to be saved (pipeline/heads/checkpoint.py).

    Args:
        model: name of the model.
        index: of the head.
    """
    return TrainedHead(
        model,
        data.task.type.value,
        tuple(data.class_names),
        tuple(map(tuple, data.array_names)),
        data.head_config,
        tuple((torch.from_numpy(mean), torch.from_numpy(scale)) for mean, scale in data.mean_scale),
        select_head(data.head_config, group, index),
    )


def tune(
    data: TaskData, config: SearchConfig, name: str, study_path: Path | None = None, cache_key: object = None
) -> dict:
    """Search learning rate and weight decay on the validation split.

    Args:
        data: with the splits `train` and `val`.
        name: printed with the progress.
        study_path, cache_key: as for `search`.

    Returns:
        As `search`.
    """

    def score(hparams: Sequence[HParams]) -> np.ndarray:
        group = train_heads(data, hparams)
        scores = score_split(data, group, "val")
        print(f"{name}: {len(hparams)} trials, best on validation {scores.max():.4f}", flush=True)
        return np.where(diverged_heads(group), np.nan, scores)

    return search(score, config, study_path, cache_key)


def train_and_test(
    data: TaskData, best_hparams: Mapping[str, float], n_seeds: int, metadata: Mapping
) -> ProtocolResult:
    """Train a head per seed with the best hyperparameters, and score each once on the test split.

    Args:
        data: with the splits `train`, `val` and `test`.
        best_hparams: learning rate and weight decay.
        metadata: further columns of the runs, such as dataset and model.

    Raises:
        UserError: heads diverged.
    """
    group = train_heads(data, [HParams(**best_hparams, seed=seed) for seed in range(n_seeds)])
    if (is_diverged := diverged_heads(group)).any():
        raise predictions.divergence_error(np.flatnonzero(is_diverged).tolist(), n_seeds)
    task, test = data.task, data.splits["test"]
    val_scores = score_split(data, group, "val")
    if task.is_dense:
        predicted = predictions.confusion_table(test.sample, count_split(data, group, "test"))
    else:
        logits = predict_logits(group, test.inputs)
        predicted = predictions.prediction_table(test.sample, test.label.cpu().numpy(), logits, task)
    _, counts = predictions.counts_from_table(predicted, task)
    test_scores = task.score(counts.sum(axis=1))
    runs = [
        {
            **metadata,
            "protocol": PROTOCOL,
            "head": describe_head(data.head_config, data.array_names, bool(task.class_weights)),
            "task": task.type.value,
            "seed": seed,
            "metric": task.metric,
            "score": test_scores[seed],
            "val_score": val_scores[seed],
            "n_test": len(test.sample),
            "classes": task.n_classes,
            **best_hparams,
        }
        for seed in range(n_seeds)
    ]
    return ProtocolResult(pd.DataFrame(runs), predicted, group, int(val_scores.argmax()))
