"""Search over learning rate and weight decay by Optuna's TPE, several trials at a time."""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import optuna

from cache.atomic import write_file
from cache.checksums import fingerprint
from pipeline.config import SearchConfig
from pipeline.errors import UserError
from pipeline.training.loop import HParams

Score = Callable[[Sequence[HParams]], Sequence[float] | np.ndarray]
# The hyperparameters that are searched: fields of SearchConfig and of HParams.
SEARCHED = ("learning_rate", "weight_decay")


def search(score: Score, config: SearchConfig, study_path: Path | None = None, cache_key: object = None) -> dict:
    """Search for the hyperparameters of the best validation score.

    Each round of trials is proposed, trained together, and reported to the sampler. A round depends only on the
    rounds before it and the seed. A search that was killed is resumed after its last whole round, with the same
    result.

    Args:
        score: returns the validation scores of heads trained with some hyperparameters; NaN for diverged heads.
        config: number of trials and bounds.
        study_path: checkpoint of finished rounds, resumed if it exists; None for none.
        cache_key: all else that the scores depend on, as JSON values; a checkpoint of another key is ignored.

    Returns:
        `best` (learning rate and weight decay), `score` (their validation score) and `trials` (all of them).

    Raises:
        UserError: every trial diverged.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {name: optuna.distributions.FloatDistribution(*getattr(config, name), log=True) for name in SEARCHED}
    key = fingerprint(config, cache_key, _code_digest())
    trials = _load_trials(study_path, key)
    while (remaining := config.trials - len(trials)) > 0:
        proposed = _propose(trials, space, min(config.trials_per_round, remaining), config)
        # Every trial has the same seed, so that trials differ in their hyperparameters only.
        scores = score([HParams(**values, seed=config.seed) for values in proposed])
        # A diverged head gets the lowest score, because TPE does not accept NaN.
        trials += [
            {**values, **({"score": float(value)} if np.isfinite(value) else {"score": 0.0, "diverged": True})}
            for values, value in zip(proposed, scores, strict=True)
        ]
        if study_path:
            study_path.parent.mkdir(parents=True, exist_ok=True)
            write_file(study_path, [json.dumps({"key": key, "trials": trials}).encode()])
    best = _best_trial(trials)
    return {"best": {name: best[name] for name in SEARCHED}, "score": best["score"], "trials": trials}


def _best_trial(trials: Sequence[dict]) -> dict:
    finite = [trial for trial in trials if "diverged" not in trial]
    if not finite:
        rates, decays = (sorted(trial[name] for trial in trials) for name in SEARCHED)
        raise UserError(
            f"All {len(trials)} trials diverged, at learning rates from {rates[0]:.3g} to {rates[-1]:.3g} and weight "
            f"decays from {decays[0]:.3g} to {decays[-1]:.3g}. Set smaller bounds of learning_rate and weight_decay "
            "for this search in params.yaml.",
            key="learning_rate, weight_decay",
            value=[(rates[0], rates[-1]), (decays[0], decays[-1])],
        )
    # Ties, of which a small validation split has many: the strongest weight decay wins.
    return max(
        finite,
        key=lambda trial: (trial["score"], _decay_strength(trial["learning_rate"] * trial["weight_decay"])),
    )


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


def _decay_strength(rate: float) -> float:
    """How much AdamW shrinks weights, by the share that it subtracts per step: above 2 they grow."""
    return rate if rate < 1 else 2 - rate


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
