"""Protocol of fine-tuning: learning rates on validation, then seeds that are tested once each."""

import gc
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr

from cache.checksums import fingerprint
from pipeline.data.augmentation import AugmentedImages
from pipeline.finetuning.model import FineTunedEnsemble
from pipeline.finetuning.train import FineTuneJob, TrainState, count_predictions, predict_batches, train
from pipeline.heads.config import describe_head
from pipeline.tasks import Task
from pipeline.training import predictions
from pipeline.training.loop import HParams
from pipeline.training.task_data import balanced_weights, task_from_store

# Keys of params.yaml that set the learning rate and the weight decay.
SEARCH_KEYS = "finetune.learning_rates, finetune.weight_decay"


@dataclass(frozen=True)
class FineTuneResult:
    """Fine-tuned seeds and their test scores, with the tensors of the best seed only: they are large.

    Attributes:
        runs: one row per seed, with the columns of the frozen protocol and `frozen_val_score`, `best_step` and
            `trained_parameters`.
        predicted: one row per seed and test sample (pipeline/training/predictions.py).
        best_tensors: the trainable parameters, by name, of the seed that is best on validation.
    """

    runs: pd.DataFrame
    predicted: pd.DataFrame
    best_tensors: dict[str, torch.Tensor]


def run_fine_tuning(
    create_model: Callable[[int], FineTunedEnsemble], job: FineTuneJob, metadata: Mapping, folder: Path
) -> FineTuneResult:
    """Fine-tune with each learning rate and one seed, then with the best learning rate and all seeds.

    Args:
        create_model: from a seed to a model that is equal to the frozen one.
        job: images, task and configuration.
        metadata: further columns of each run: `dataset`, `model` and others.
        folder: of checkpoints; a run with a finished checkpoint is not repeated.
    """
    config, task = job.config, job.task
    # Ties: the smallest rate wins, because it departs least from the frozen model. A single rate needs no choice.
    rate = min(config.learning_rates)
    if len(config.learning_rates) > 1:
        val_scores = {
            candidate: _train(create_model, job, metadata, folder, candidate, 0)[1].best_score
            for candidate in sorted(config.learning_rates)
        }
        rate = max(val_scores, key=val_scores.get)
    rows, outputs, best_score, best_tensors = [], [], -1.0, {}
    for seed in range(config.seeds):
        model, state = _train(create_model, job, metadata, folder, rate, seed)
        outputs.append(_predict_test(model, job))
        head = model.trained_head
        rows.append(
            {**metadata, "protocol": config.protocol,
             "head": describe_head(head.config, head.array_names, bool(task.class_weights)),
             "task": task.type.value, "seed": seed, "metric": task.metric, "score": None,
             "val_score": state.best_score, "n_test": len(job.images.rows("test")), "classes": task.n_classes,
             "learning_rate": rate, "weight_decay": config.weight_decay, "frozen_val_score": state.frozen_score,
             "best_step": state.best_step,
             "trained_parameters": sum(tensor.numel() for tensor in state.best_tensors.values())}
        )  # fmt: skip
        if state.best_score > best_score:
            best_score, best_tensors = state.best_score, state.best_tensors
        del model, head  # free its memory before the next model is created
    table = _predictions(job, np.stack(outputs))
    _, counts = predictions.counts_from_table(table, task)
    scores = task.score(counts.sum(axis=1))
    return FineTuneResult(pd.DataFrame(rows).assign(score=scores), table, best_tensors)


def make_task(images: xr.Dataset, augmented_images: AugmentedImages, class_weights: str) -> Task:
    """Return the task of an images store, with class weights as for frozen heads.

    Args:
        images: the images store.
        augmented_images: its labelled samples.
        class_weights: `heads.class_weights` of params.yaml: `none` or `balanced`.
    """
    task = task_from_store(images)
    if class_weights == "none":
        return task
    label = augmented_images.label(augmented_images.rows("train"))
    return replace(task, class_weights=balanced_weights(label, task))


def checkpoint_folder(folder: Path, cache_key: object) -> Path:
    """Return the folder of checkpoints for a cache key and the current code; delete all others.

    Args:
        folder: of this dataset and model.
        cache_key: everything else that decides the checkpoints, for `fingerprint`.
    """
    code = [path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
    path = folder / fingerprint(code, cache_key)[:16]
    for other in folder.glob("*"):
        if other != path:
            shutil.rmtree(other)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _train(
    create_model: Callable[[int], FineTunedEnsemble],
    job: FineTuneJob,
    metadata: Mapping,
    folder: Path,
    rate: float,
    seed: int,
) -> tuple[FineTunedEnsemble, TrainState]:
    """Train one seed at one learning rate, or resume it, and print its scores on validation."""
    gc.collect()  # some networks refer to themselves, and Python does not collect them when the GPU's memory is full
    model, path = create_model(seed), folder / f"{rate:g}-seed{seed}.pt"
    state = train(model, job, HParams(rate, job.config.weight_decay, seed), path)
    print(
        f"{metadata['dataset']} {metadata['model']}: learning rate {rate:g}, seed {seed}: validation "
        f"{state.frozen_score:.4f} frozen, {state.best_score:.4f} after {state.best_step} of "
        f"{job.config.steps} steps",
        flush=True,
    )
    return model, state


def _predict_test(model: FineTunedEnsemble, job: FineTuneJob) -> np.ndarray:
    """Predict the test split: counts (sample, cell) for segmentation, else logits (sample, class)."""
    if job.task.is_dense:
        return count_predictions(model, job, "test")
    return torch.cat([logits.float().cpu() for logits, _ in predict_batches(model, job, "test")]).numpy()


def _predictions(job: FineTuneJob, outputs: np.ndarray) -> pd.DataFrame:
    """Return the table of predictions of the test split, from the outputs of all seeds."""
    rows = job.images.rows("test")
    samples = job.images.sample[rows].tolist()
    if job.task.is_dense:
        return predictions.confusion_table(samples, outputs)
    label = job.images.label(rows).astype(np.int64)
    return predictions.prediction_table(samples, label, outputs, job.task, SEARCH_KEYS)
