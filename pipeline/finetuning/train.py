"""Fine-tuning: search the learning rate on validation, then train seeds that are tested once each.

One fine-tuning is AdamW with selection of the best step on validation, and checkpoints to resume from. All random
draws depend only on the seed and the step. A run that is resumed from a checkpoint therefore ends as an uninterrupted
one: bit-identical on a CPU.
"""

import gc
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.optim import AdamW
from tqdm import tqdm

from cache.atomic import sync_file, sync_folder
from cache.checksums import fingerprint
from pipeline.config import FineTuneConfig
from pipeline.data.augmentation import AugmentedImages
from pipeline.finetuning.model import FineTunedEnsemble
from pipeline.heads.config import describe_head
from pipeline.tasks import Task
from pipeline.training import predictions
from pipeline.training.loop import HParams, TrainSchedule, batch_order
from pipeline.training.optim import BETAS, EPSILON, warm_cosine
from pipeline.training.task_data import balanced_weights, task_from_store

# Keys of params.yaml that set the learning rate and the weight decay.
SEARCH_KEYS = "finetune.learning_rates, finetune.weight_decay"

CreateModel = Callable[[int], FineTunedEnsemble]


@dataclass(frozen=True)
class FineTuneJob:
    images: AugmentedImages
    task: Task
    config: FineTuneConfig


@dataclass
class TrainState:
    """Progress of a run: finished steps, scores on validation, trainable parameters of the best step."""

    step: int = 0
    frozen_score: float = 0.0
    best_score: float = -1.0  # ties: the latest step wins
    best_step: int = 0
    best_tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    finished: bool = False


@dataclass(frozen=True)
class FineTuneResult:
    """Fine-tuned seeds and their test scores.

    `runs` has a row per seed, `predicted` a row per seed and test sample (pipeline/training/predictions.py);
    `best_tensors` are the trainable parameters of the seed that is best on validation.
    """

    runs: pd.DataFrame
    predicted: pd.DataFrame
    best_tensors: dict[str, torch.Tensor]


def run_fine_tuning(create_model: CreateModel, job: FineTuneJob, metadata: Mapping, folder: Path) -> FineTuneResult:
    """Fine-tune with each learning rate and one seed, then with the best learning rate and all seeds.

    Args:
        create_model: from a seed to a model that is equal to the frozen one.
        metadata: further columns of each run: `dataset`, `model` and others.
        folder: of checkpoints; a run with a finished checkpoint is not repeated.
    """
    config, task, images = job.config, job.task, job.images

    def train_seed(rate: float, seed: int) -> tuple[FineTunedEnsemble, TrainState]:
        gc.collect()  # some networks refer to themselves, and Python does not collect them when the GPU is full
        model = create_model(seed)
        hparams = HParams(rate, config.weight_decay, seed)
        state = train(model, job, hparams, folder / f"{rate:g}-seed{seed}.pt")
        print(
            f"{metadata['dataset']} {metadata['model']}: learning rate {rate:g}, seed {seed}: validation "
            f"{state.frozen_score:.4f} frozen, {state.best_score:.4f} after {state.best_step} of "
            f"{config.steps} steps",
            flush=True,
        )
        return model, state

    # Ties: the smallest rate wins, because it changes the frozen model least. A single rate needs no choice.
    rates = sorted(config.learning_rates)
    rate = rates[0] if len(rates) == 1 else max(rates, key=lambda rate: train_seed(rate, 0)[1].best_score)
    rows, outputs, best_score, best_tensors = [], [], -1.0, {}
    for seed in range(config.seeds):
        model, state = train_seed(rate, seed)
        if task.is_dense:
            outputs.append(count_predictions(model, job, "test"))
        else:
            logits = [logits.float().cpu() for logits, _ in predict_batches(model, job, "test")]
            outputs.append(torch.cat(logits).numpy())
        head = model.trained_head
        rows.append(
            {**metadata, "protocol": config.protocol,
             "head": describe_head(head.config, head.array_names, bool(task.class_weights)),
             "task": task.type.value, "seed": seed, "metric": task.metric, "score": None,
             "val_score": state.best_score, "n_test": len(images.rows("test")), "classes": task.n_classes,
             "learning_rate": rate, "weight_decay": config.weight_decay, "frozen_val_score": state.frozen_score,
             "best_step": state.best_step,
             "trained_parameters": sum(tensor.numel() for tensor in state.best_tensors.values())}
        )  # fmt: skip
        if state.best_score > best_score:
            best_score, best_tensors = state.best_score, state.best_tensors
        del model, head  # free its memory before the next model is created
    test_rows = images.rows("test")
    samples, label = images.sample[test_rows].tolist(), images.label(test_rows).astype(np.int64)
    table, scores = predictions.tabulate(samples, label, np.stack(outputs), task, SEARCH_KEYS)
    return FineTuneResult(pd.DataFrame(rows).assign(score=scores), table, best_tensors)


def make_task(images: AugmentedImages, class_weights: str) -> Task:
    """Return the task of images, with class weights (`none` or `balanced`) as for frozen heads."""
    task = task_from_store(images.images)
    if class_weights == "none":
        return task
    return replace(task, class_weights=balanced_weights(images.label(images.rows("train")), task))


def checkpoint_folder(folder: Path, cache_key: object) -> Path:
    """Return the folder of checkpoints for a cache key and the current code; delete all others."""
    code = [path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
    path = folder / fingerprint(code, cache_key)[:16]
    for stale_folder in set(folder.glob("*")) - {path}:
        shutil.rmtree(stale_folder)
    path.mkdir(parents=True, exist_ok=True)
    return path


def train(model: FineTunedEnsemble, job: FineTuneJob, hparams: HParams, checkpoint_path: Path) -> TrainState:
    """Fine-tune a model, and leave it with the parameters of its best validation check.

    A checkpoint is written after every check, and resumed if it exists. A non-finite loss ends the run at the next
    check.
    """
    config = job.config
    groups = model.parameter_groups(hparams.learning_rate, hparams.weight_decay)
    optimizer = AdamW(groups, betas=BETAS, eps=EPSILON)
    rows = job.images.rows("train")
    batches = rows[batch_order(len(rows), TrainSchedule(config.steps, config.batch), hparams.seed).numpy()]
    lr_factor, check_interval = warm_cosine(config.steps), max(1, config.steps // config.val_checks)
    state = _resume(checkpoint_path, model, optimizer)
    if state is None:
        state = TrainState()
        state.frozen_score = _validate(state, model, job)
    with tqdm(total=config.steps, initial=state.step, unit="step", mininterval=2, file=sys.stderr) as progress:
        while not state.finished:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lr_factor(state.step)
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
    optimizer: AdamW,
    job: FineTuneJob,
    rows: np.ndarray,
    generator: np.random.Generator | None,
) -> torch.Tensor:
    """Take one step on samples, whose views `generator` draws; return the loss before it, a scalar."""
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
    """Count the predictions of a split, int64 (sample, entry); see pipeline/tasks.py."""
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


def _write_checkpoint(path: Path, state: TrainState, model: FineTunedEnsemble, optimizer: AdamW) -> None:
    """Write a checkpoint under a temporary name, flush it to the disk, and rename it."""
    stored = dict(vars(state))
    if not state.finished:
        parameters = model.trainable_parameters().items()
        stored["current_tensors"] = {name: parameter.detach() for name, parameter in parameters}
        stored["optimizer"] = optimizer.state_dict()
    partial = path.with_name(f"{path.name}.partial")
    torch.save(stored, partial)
    sync_file(partial)
    partial.replace(path)
    sync_folder(path.parent)


def _resume(path: Path, model: FineTunedEnsemble, optimizer: AdamW) -> TrainState | None:
    """Read a checkpoint and set the model and the optimizer to it; None if there is no checkpoint."""
    if not path.exists():
        return None
    stored = torch.load(path, map_location="cpu", weights_only=True)
    if not stored["finished"]:
        model.load_trainable(stored.pop("current_tensors"))
        optimizer.load_state_dict(stored.pop("optimizer"))
    return TrainState(**stored)
