"""One fine-tuning: AdamW, selection of the best step on validation, and checkpoints to resume from.

All random draws depend only on the seed and the step. A run that is resumed from a checkpoint therefore ends as an
uninterrupted one: bit-identical on a CPU.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cache.atomic import sync_file, sync_folder
from pipeline.config import FineTuneConfig
from pipeline.data.augmentation import AugmentedImages
from pipeline.finetuning.model import FineTunedEnsemble
from pipeline.tasks import Task
from pipeline.training.loop import HParams, TrainSchedule, batch_order
from pipeline.training.optim import BETAS, EPSILON, warm_cosine

# Seconds between updates of the progress bar.
PROGRESS_INTERVAL = 2


@dataclass(frozen=True)
class FineTuneJob:
    """The data, the task and the configuration of a fine-tuning."""

    images: AugmentedImages
    task: Task
    config: FineTuneConfig


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        step: number of finished steps.
        frozen_score: score of the frozen model on validation.
        best_score, best_step: best score on validation so far and its step. Ties: the latest wins.
        best_tensors: the trainable parameters at that step, by name, on the CPU.
        finished: whether the run has ended.
    """

    step: int = 0
    frozen_score: float = 0.0
    best_score: float = -1.0
    best_step: int = 0
    best_tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    finished: bool = False


def train(model: FineTunedEnsemble, job: FineTuneJob, hparams: HParams, checkpoint_path: Path) -> TrainState:
    """Fine-tune a model, and leave it with the parameters of its best validation check.

    Args:
        model: with the parameters of the frozen model.
        job: images, task and configuration.
        hparams: learning rate, weight decay and seed.
        checkpoint_path: written after every validation check; the run is resumed from it if it exists.

    Returns:
        The state at the end. A run whose loss is not finite ends at the next check.
    """
    config = job.config
    groups = model.parameter_groups(hparams.learning_rate, hparams.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON)
    rows = job.images.rows("train")
    batches = rows[batch_order(len(rows), TrainSchedule(config.steps, config.batch), hparams.seed).numpy()]
    lr_factor, check_interval = warm_cosine(config.steps), max(1, config.steps // config.val_checks)
    state = _resume(checkpoint_path, model, optimizer)
    if state is None:
        state = TrainState()
        state.frozen_score = _validate(state, model, job)
    with tqdm(
        total=config.steps, initial=state.step, unit="step", mininterval=PROGRESS_INTERVAL, file=sys.stderr
    ) as progress:
        while not state.finished:
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * lr_factor(state.step)
            generator = np.random.default_rng([hparams.seed, state.step]) if config.augment else None
            loss = train_step(model, optimizer, job, batches[state.step], generator)
            state.step += 1
            progress.update()
            if state.step % check_interval == 0 or state.step == config.steps:
                is_finite = bool(torch.isfinite(loss))
                result = f"{_validate(state, model, job):.4f}" if is_finite else "diverged"
                state.finished = not is_finite or state.step == config.steps
                _write_checkpoint(checkpoint_path, state, model, optimizer)
                progress.set_postfix_str(
                    f"validation {result}, best {state.best_score:.4f} at step {state.best_step}"
                )
    model.load_trainable(state.best_tensors)
    return state


def train_step(
    model: FineTunedEnsemble,
    optimizer: torch.optim.Optimizer,
    job: FineTuneJob,
    rows: np.ndarray,
    generator: np.random.Generator | None,
) -> torch.Tensor:
    """Take one optimizer step.

    Args:
        model, optimizer: updated in place.
        job: images and task.
        rows: indices of the batch's samples.
        generator: draws the views of the images; None leaves them upright.

    Returns:
        The loss before the step, a scalar.
    """
    image, label = job.images.batch(rows, generator)
    optimizer.zero_grad(set_to_none=True)
    logits = model(image, rows)
    loss = job.task.loss(logits[None], torch.from_numpy(label).to(logits.device)[None]).sum()
    loss.backward()
    optimizer.step()
    return loss.detach()


def predict_batches(
    model: FineTunedEnsemble, job: FineTuneJob, split: str
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Yield the logits (batch, class, …) and the labels of a split, batch by batch."""
    rows, batch = job.images.rows(split), job.config.batch
    for start in range(0, len(rows), batch):
        image, label = job.images.batch(rows[start : start + batch])
        with torch.no_grad():
            yield model(image, rows[start : start + batch]), label


def count_predictions(model: FineTunedEnsemble, job: FineTuneJob, split: str) -> np.ndarray:
    """Count the predictions of a split, int64 (sample, cell); see pipeline/metrics.py."""
    batches = []
    for logits, label in predict_batches(model, job, split):
        predicted = job.task.predict_labels(logits, torch.from_numpy(label).to(logits.device), dim=1)
        batches.append(job.task.counts(predicted.cpu().numpy(), label.astype(np.int64)))
    return np.concatenate(batches)


def _validate(state: TrainState, model: FineTunedEnsemble, job: FineTuneJob) -> float:
    """Compute the score on validation, and save the trainable parameters in `state` if it is the best."""
    score = float(job.task.score(count_predictions(model, job, "val").sum(axis=0)))
    if score >= state.best_score:
        state.best_score, state.best_step = score, state.step
        state.best_tensors = {
            name: parameter.detach().cpu().clone() for name, parameter in model.trainable_parameters().items()
        }
    return score


def _write_checkpoint(
    path: Path, state: TrainState, model: FineTunedEnsemble, optimizer: torch.optim.Optimizer
) -> None:
    """Write a checkpoint under a temporary name, flush it to the disk, and rename it."""
    stored = dict(vars(state))
    if not state.finished:
        stored["current_tensors"] = {
            name: parameter.detach() for name, parameter in model.trainable_parameters().items()
        }
        stored["optimizer"] = optimizer.state_dict()
    partial = path.with_name(f"{path.name}.partial")
    torch.save(stored, partial)
    sync_file(partial)
    partial.replace(path)
    sync_folder(path.parent)


def _resume(path: Path, model: FineTunedEnsemble, optimizer: torch.optim.Optimizer) -> TrainState | None:
    """Read a checkpoint and set the model and the optimizer to it; None if there is no checkpoint."""
    if not path.exists():
        return None
    stored = torch.load(path, map_location="cpu", weights_only=True)
    if not stored["finished"]:
        model.load_trainable(stored.pop("current_tensors"))
        optimizer.load_state_dict(stored.pop("optimizer"))
    return TrainState(**stored)
