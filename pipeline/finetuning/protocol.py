"""The protocol of fine-tuning: learning rates on validation, then seeds, each read once on the test split."""

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from sklearn.utils.class_weight import compute_class_weight

from pipeline.data.augmentation import AugmentedImages
from pipeline.finetuning import train
from pipeline.finetuning.model import FineTunedEnsemble
from pipeline.finetuning.train import FineTuneJob, TrainState
from pipeline.heads.config import describe_head
from pipeline.tasks import Task
from pipeline.training import predictions, task_data
from pipeline.training.loop import HParams

# What holds learning rate and weight decay down here.
BOUNDS = "finetune.learning_rates, finetune.weight_decay"


@dataclass(frozen=True)
class Tested:
    """Seeds that were read on the test split.

    Attributes:
        runs: one row a seed, with the columns of the frozen protocol and a few more.
        predicted: one row a seed and test sample (pipeline/training/predictions.py).
        best: what was trained, by name, of the seed with the best score on validation.
    """

    runs: pd.DataFrame
    predicted: pd.DataFrame
    best: dict[str, torch.Tensor]


def run_fine_tuning(make: Callable[[int], FineTunedEnsemble], job: FineTuneJob, told: Mapping, folder: Path) -> Tested:
    """Fine-tune with every learning rate and the first seed, then with the best one and all seeds.

    Args:
        make: from a seed to the frozen model.
        told: what else each run's row says, such as its data set and model.
        folder: where checkpoints are kept; finished runs there are not run again.
    """
    described = job.config

    def trained(rate: float, seed: int) -> tuple[FineTunedEnsemble, TrainState]:
        gc.collect()  # some networks hold themselves, and a GPU that is full of them does not make Python look
        tuned, path = make(seed), folder / f"{rate:g}-seed{seed}.pt"
        done = train.train(tuned, job, HParams(rate, described.weight_decay, seed), path)
        print(f"{told['dataset']} {told['model']}: learning rate {rate:g}, seed {seed}: validation {done.frozen_score:.4f} "
              f"frozen, {done.best_score:.4f} after {done.best_step} of {described.steps} steps", flush=True)  # fmt: skip
        return tuned, done

    # Of equals the smallest, which departs least from the frozen model. One alone needs no choice.
    rates = sorted(described.learning_rates)
    rate = max(rates, key=lambda rate: trained(rate, 0)[1].best_score) if len(rates) > 1 else rates[0]
    rows, said, best, kept = [], [], -1.0, {}
    for seed in range(described.seeds):
        tuned, done = trained(rate, seed)
        said.append(_said(tuned, job))
        rows.append(
            {**told, "protocol": described.protocol,
             "head": describe_head(tuned.trained_head.config, tuned.trained_head.array_names, bool(job.task.class_weights)),
             "task": job.task.type.value, "seed": seed, "metric": job.task.metric,
             "score": None, "val_score": done.best_score,
             "n_test": len(job.images.rows("test")), "classes": job.task.n_classes, "learning_rate": rate,
             "weight_decay": described.weight_decay, "frozen_val_score": done.frozen_score, "best_step": done.best_step,
             "trained_parameters": sum(values.numel() for values in done.best_tensors.values())}
        )  # fmt: skip
        if done.best_score > best:
            best, kept = done.best_score, done.best_tensors
        del tuned  # before the next is made
    predicted = _predicted(job, np.stack(said))
    _, counts = predictions.counts_from_table(predicted, job.task)
    scores = job.task.score(counts.sum(axis=1))
    return Tested(pd.DataFrame(rows).assign(score=scores), predicted, kept)


def make_task(opened: xr.Dataset, images: AugmentedImages, class_weights: str) -> Task:
    """What an images store asks, its classes weighted as for the frozen heads (`heads.class_weights`)."""
    asked = task_data.task_from_store(opened)
    if class_weights == "none":
        return asked
    label = images.label(images.rows("train"))
    label, weights = label[label != asked.ignore_value], np.ones(asked.n_classes)
    present = np.unique(label)
    weights[present] = compute_class_weight("balanced", classes=present, y=label.flatten())
    return replace(asked, weights=tuple(weights.tolist()))


def checkpoint_folder(folder: Path, about: object) -> Path:
    """The place in `folder` of checkpoints, named by everything that decides them; others there are removed."""
    code = Path(__file__).parents[1]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(code.rglob("*.py"))))
    digest.update(json.dumps(about, sort_keys=True).encode())
    path = folder / digest.hexdigest()[:16]
    for old in folder.glob("*"):
        if old != path:
            shutil.rmtree(old)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _said(tuned: FineTunedEnsemble, job: FineTuneJob) -> np.ndarray:
    """Of the test split: counts of masks, (sample, cells), or logits (sample, class)."""
    if job.task.is_dense:
        return train.counts(tuned, job, "test")
    return torch.cat([said.float().cpu() for said, _ in train.logits(tuned, job, "test")]).numpy()


def _predicted(job: FineTuneJob, said: np.ndarray) -> pd.DataFrame:
    rows = job.images.rows("test")
    samples = job.images.sample[rows].tolist()
    if job.task.is_dense:
        return predictions.confusion_table(samples, said)
    label = job.images.label(rows).astype(np.int64)
    return predictions.prediction_table(samples, label, said, job.task, BOUNDS)
