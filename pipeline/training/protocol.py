"""The frozen protocol: search hyperparameters on validation, then score seeds on test.

The backbones are frozen, and features are read from the cache. Every seed is scored once on the test split. Learning
rate and weight decay are searched by Optuna's TPE, several trials at a time. Distillation uses the same search.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import torch
from optuna.distributions import FloatDistribution

from cache.atomic import write_file
from cache.checksums import fingerprint
from pipeline.config import SearchConfig
from pipeline.errors import UserError
from pipeline.heads.checkpoint import TrainedHead, select_head
from pipeline.heads.config import HeadGroup, describe_head
from pipeline.training import predictions, task_data
from pipeline.training.loop import HParams, fit
from pipeline.training.predictions import diverged_heads, evaluate, predict_logits
from pipeline.training.task_data import TaskData

# Value of the column `protocol` of the runs; fine-tuning and distillation have others.
PROTOCOL = "frozen"
# The hyperparameters that are searched: fields of SearchConfig and of HParams.
SEARCHED = ("learning_rate", "weight_decay")

Score = Callable[[Sequence[HParams]], Sequence[float] | np.ndarray]


@dataclass(frozen=True)
class ProtocolResult:
    """Trained seeds and their test scores.

    Attributes:
        runs: one row per seed.
        predicted: one row per seed and test sample (pipeline/training/predictions.py).
        group: the trained models of all seeds: a group of heads, or a list of students.
        best_index: index of the model of the best validation score.
    """

    runs: pd.DataFrame
    predicted: pd.DataFrame
    group: Any
    best_index: int


def tune(
    data: TaskData, config: SearchConfig, name: str, study_path: Path | None = None, cache_key: object = None
) -> dict:
    """Search on the splits `train` and `val`; prints `name` with the progress, else as `search`."""

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

    `metadata` are further columns of the runs, such as dataset and model. Heads that diverged raise UserError.
    """
    group = train_heads(data, [HParams(**best_hparams, seed=seed) for seed in range(n_seeds)])
    if (is_diverged := diverged_heads(group)).any():
        raise predictions.divergence_error(np.flatnonzero(is_diverged).tolist(), n_seeds)
    task, test = data.task, data.splits["test"]
    val_scores = score_split(data, group, "val")
    outputs = count_split(data, group, "test") if task.is_dense else predict_logits(group, test.inputs)
    predicted, test_scores = predictions.tabulate(test.sample, test.label.cpu().numpy(), outputs, task)
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


def train_heads(data: TaskData, hparams: Sequence[HParams]) -> HeadGroup:
    """Train a head per hyperparameters; linear ones in the principal axes of their inputs."""
    splits = [data.splits[name] for name in (("train", "val") if data.schedule.patience else ("train",))]
    if data.rotations:
        splits = [replace(split, inputs=task_data.rotate(split.inputs, data.rotations)) for split in splits]
    train, *validation = splits
    group = fit(data.head_config.create_group, train, data.task, hparams, data.schedule, *validation)
    if data.rotations:
        task_data.rotate_back(group, data.rotations)
    return group


def count_split(data: TaskData, group: HeadGroup, split: str) -> np.ndarray:
    """Count hits and errors of every head on a split, as `predictions.evaluate`."""
    return evaluate(group, data.splits[split], data.task, data.schedule.batch)


def score_split(data: TaskData, group: HeadGroup, split: str) -> np.ndarray:
    return data.task.score(count_split(data, group, split).sum(axis=1))


def trained_head(data: TaskData, model: str, group: HeadGroup, index: int) -> TrainedHead:
    """Return one head of a trained group, ready to be saved (pipeline/heads/checkpoint.py)."""
    return TrainedHead(
        model,
        data.task.type.value,
        tuple(data.class_names),
        tuple(map(tuple, data.array_names)),
        data.head_config,
        tuple((torch.from_numpy(mean), torch.from_numpy(scale)) for mean, scale in data.mean_scale),
        select_head(data.head_config, group, index),
    )


def search(score: Score, config: SearchConfig, study_path: Path | None = None, cache_key: object = None) -> dict:
    """Search for the hyperparameters of the best validation score.

    A round depends only on the rounds before it and the seed, so a search that was killed is resumed after its last
    whole round, with the same result.

    Args:
        score: returns the validation scores of heads trained with some hyperparameters; NaN for diverged heads.
        study_path: checkpoint of finished rounds, resumed if it exists; None for none.
        cache_key: all else that the scores depend on, as JSON values; a checkpoint of another key is ignored.

    Returns:
        `best` (learning rate and weight decay), `score` (their validation score) and `trials` (all of them).
        UserError if every trial diverged.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    bounds = {name: getattr(config, name) for name in SEARCHED}
    space = {name: FloatDistribution(low, high, log=True) for name, (low, high) in bounds.items()}
    key = fingerprint(config, cache_key, _code_digest())
    trials = _load_trials(study_path, key)
    while (remaining := config.trials - len(trials)) > 0:
        proposed = _propose(trials, space, min(config.trials_per_round, remaining), config)
        # Every trial has the same seed, so that trials differ in their hyperparameters only.
        scores = score([HParams(**values, seed=config.seed) for values in proposed])
        for values, value in zip(proposed, scores, strict=True):
            # A diverged head gets the lowest score, because TPE does not accept NaN.
            result = {"score": float(value)} if np.isfinite(value) else {"score": 0.0, "diverged": True}
            trials.append(values | result)
        if study_path:
            study_path.parent.mkdir(parents=True, exist_ok=True)
            write_file(study_path, [json.dumps({"key": key, "trials": trials}).encode()])
    best = _best_trial(trials)
    return {"best": {name: best[name] for name in SEARCHED}, "score": best["score"], "trials": trials}


def _propose(trials: Sequence[dict], space: dict, count: int, config: SearchConfig) -> list[dict]:
    """Propose a round of hyperparameters: random in the first half of all trials, then by TPE."""
    # One seed per round, because the state of a sampler is lost with its process.
    seed = int(np.random.SeedSequence([config.seed, len(trials)]).generate_state(1)[0])
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    sampler = optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=config.trials // 2, multivariate=True, constant_liar=True
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in trials:
        values = {name: trial[name] for name in space}
        study.add_trial(optuna.trial.create_trial(params=values, distributions=space, value=trial["score"]))
    return [study.ask(space).params for _ in range(count)]


def _best_trial(trials: Sequence[dict]) -> dict:
    if not (finite := [trial for trial in trials if "diverged" not in trial]):
        rates, decays = (sorted(trial[name] for trial in trials) for name in SEARCHED)
        raise UserError(
            f"All {len(trials)} trials diverged, at learning rates from {rates[0]:.3g} to {rates[-1]:.3g} and weight "
            f"decays from {decays[0]:.3g} to {decays[-1]:.3g}. Set smaller bounds of learning_rate and weight_decay "
            "for this search in params.yaml.",
            key="learning_rate, weight_decay",
            value=[(rates[0], rates[-1]), (decays[0], decays[-1])],
        )

    def score_and_decay(trial: dict) -> tuple[float, float]:
        rate = trial["learning_rate"] * trial["weight_decay"]
        # AdamW multiplies weights by 1 - rate: above 1 their sign changes at every step; above 2 they grow.
        return trial["score"], min(rate, 2 - rate)

    # Ties, of which a small validation split has many: the strongest weight decay wins.
    return max(finite, key=score_and_decay)


def _load_trials(study_path: Path | None, key: str) -> list[dict]:
    """Trials of finished rounds; none if the checkpoint is missing, damaged, or of another key."""
    try:
        study = json.loads(study_path.read_bytes()) if study_path else {}
    except (FileNotFoundError, ValueError):  # ValueError: not JSON, or not text
        return []
    return study["trials"] if isinstance(study, dict) and study.get("key") == key else []


def _code_digest() -> str:
    """Digest of the pipeline's source: trials of other code are not resumed."""
    folder = Path(__file__).parents[1]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))).hexdigest()
