"""One fine-tuning: AdamW from the frozen model on, validation that chooses the step, checkpoints that outlive a kill.

All that is drawn at random follows from the seed and the step, so a run that goes on from a checkpoint ends as it
would have; on a CPU, to the last digit.
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


@dataclass(frozen=True)
class FineTuneJob:
    """What is learnt from what, and how."""

    images: AugmentedImages
    task: Task
    config: FineTuneConfig


@dataclass
class TrainState:
    """How far a run is.

    Attributes:
        step: updates done.
        start: the frozen model's score on validation.
        best, at: the best score on validation so far, and after which step; of equals the later.
        kept: what is trained, as it was then, by name.
        over: the run has ended.
    """

    step: int = 0
    frozen_score: float = 0.0
    best_score: float = -1.0
    best_step: int = 0
    best_tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    finished: bool = False


def train(tuned: FineTunedEnsemble, job: FineTuneJob, setting: HParams, checkpoint: Path) -> TrainState:
    """Train a model that is still the frozen one, and leave it as it was at its best on validation.

    Args:
        checkpoint: a file that is written after every check; if it is there, the run goes on from it.
    """
    optimiser = torch.optim.AdamW(tuned.parameter_groups(setting.learning_rate, setting.weight_decay), betas=BETAS, eps=EPSILON)
    steps, rows = job.config.steps, job.images.rows("train")
    batches = rows[batch_order(len(rows), TrainSchedule(steps, job.config.batch), setting.seed).numpy()]
    factor, every = warm_cosine(steps), max(1, steps // job.config.val_checks)
    done = _read(checkpoint, tuned, optimiser)
    if done is None:
        done = TrainState()
        done.frozen_score = _check(done, tuned, job)
    with tqdm(total=steps, initial=done.step, unit="step", mininterval=2, file=sys.stderr) as bar:
        while not done.finished:
            for group in optimiser.param_groups:
                group["lr"] = group["rate"] * factor(done.step)
            draw = np.random.default_rng([setting.seed, done.step]) if job.config.augment else None
            lost = update(tuned, optimiser, job, batches[done.step], draw)
            done.step += 1
            bar.update()
            if done.step % every == 0 or done.step == steps:
                finite = bool(torch.isfinite(lost))
                says = f"{_check(done, tuned, job):.4f}" if finite else "diverged"
                done.finished = not finite or done.step == steps
                _write(checkpoint, done, tuned, optimiser)
                bar.set_postfix_str(f"validation {says}, best {done.best_score:.4f} at step {done.best_step}")
    tuned.load_trainable(done.best_tensors)
    return done


def logits(tuned: FineTunedEnsemble, job: FineTuneJob, split: str) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """What the model says of a split, batch by batch, and the labels."""
    rows, batch = job.images.rows(split), job.config.batch
    for start in range(0, len(rows), batch):
        image, label = job.images.batch(rows[start : start + batch])
        with torch.no_grad():
            yield tuned(image, rows[start : start + batch]), label


def counts(tuned: FineTunedEnsemble, job: FineTuneJob, split: str) -> np.ndarray:
    """Per-sample counts of a split, int64 (sample, cells); see pipeline/metrics."""
    task, parts = job.task, []
    for answered, label in logits(tuned, job, split):
        predicted = task.predict_labels(answered, torch.from_numpy(label).to(answered.device), dim=1).cpu().numpy()
        parts.append(task.counts(predicted, label.astype(np.int64)))
    return np.concatenate(parts)


def update(
    tuned: FineTunedEnsemble, optimiser, job: FineTuneJob, rows: np.ndarray, draw: np.random.Generator | None
) -> torch.Tensor:
    """One update; the loss before it."""
    image, label = job.images.batch(rows, draw)
    optimiser.zero_grad(set_to_none=True)
    answered = tuned(image, rows)
    lost = job.task.loss(answered[None], torch.from_numpy(label).to(answered.device)[None]).sum()
    lost.backward()
    optimiser.step()
    return lost.detach()


def _check(done: TrainState, tuned: FineTunedEnsemble, job: FineTuneJob) -> float:
    """The score on validation; what is trained is kept if it is the best."""
    score = float(job.task.score(counts(tuned, job, "val").sum(axis=0)))
    if score >= done.best_score:
        done.best_score, done.best_step = score, done.step
        done.best_tensors = {name: values.detach().cpu().clone() for name, values in tuned.trainable_parameters().items()}
    return score


def _write(path: Path, done: TrainState, tuned: FineTunedEnsemble, optimiser: torch.optim.Optimizer) -> None:
    """A checkpoint that is on the disk, whole, when it has its name; of a run that is over, what it ended with."""
    held = dict(vars(done))
    if not done.finished:
        held |= {"now": {name: values.detach() for name, values in tuned.trainable_parameters().items()}}
        held |= {"optimiser": optimiser.state_dict()}
    partial = path.with_name(f"{path.name}.partial")
    torch.save(held, partial)
    sync_file(partial)
    partial.replace(path)
    sync_folder(path.parent)


def _read(path: Path, tuned: FineTunedEnsemble, optimiser: torch.optim.Optimizer) -> TrainState | None:
    """What a checkpoint holds, the model and the optimiser set to it; None if there is none."""
    if not path.exists():
        return None
    held = torch.load(path, map_location="cpu", weights_only=True)
    if not held["over"]:
        tuned.load_trainable(held.pop("now"))
        optimiser.load_state_dict(held.pop("optimiser"))
    return TrainState(**held)
