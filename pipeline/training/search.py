"""The search over learning rate and weight decay: Optuna's TPE, asked for several trials at a time."""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import optuna

from cache.atomic import write_file
from pipeline.config import SearchConfig
from pipeline.errors import UserError
from pipeline.training.loop import HParams

Score = Callable[[Sequence[HParams]], Sequence[float]]


def search(score: Score, described: SearchConfig, study: Path | None = None, about: object = None) -> dict:
    """Search for the setting with the best validation score.

    A round of trials is asked for, trained together and told. What a round asks for depends on the rounds before it
    and the seed alone, so a search that was killed goes on after its last whole round and ends as it would have.

    Args:
        score: validation scores of heads trained with the given settings, together; NaN of those that diverged.
        described: numbers of trials and bounds.
        study: where finished rounds are kept, to be gone on with; None to keep nothing.
        about: what the scores depend on besides, as plain data; a study about something else is begun anew.

    Returns:
        `best`, the learning rate and weight decay; `score`, theirs on validation; and all `trials`.

    Raises:
        UserError: every trial diverged.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {
        name: optuna.distributions.FloatDistribution(*getattr(described, name), log=True)
        for name in ("learning_rate", "weight_decay")
    }
    key = hashlib.sha256(json.dumps([asdict(described), about, _code()], sort_keys=True).encode()).hexdigest()
    trials = _kept(study, key)
    while (left := described.trials - len(trials)) > 0:
        asked = _ask(trials, space, min(described.trials_per_round, left), described)
        # Every trial has the same seed, so that trials differ in their settings alone.
        scores = score([HParams(**params, seed=described.seed) for params in asked])
        # A head that diverged is the worst there is, and TPE is told so; NaN it would not take.
        trials += [
            {**params, **({"score": float(value)} if np.isfinite(value) else {"score": 0.0, "diverged": True})}
            for params, value in zip(asked, scores, strict=True)
        ]
        if study:
            study.parent.mkdir(parents=True, exist_ok=True)
            write_file(study, [json.dumps({"key": key, "trials": trials}).encode()])
    going = [trial for trial in trials if "diverged" not in trial]
    if not going:
        rates, decays = (sorted(trial[name] for trial in trials) for name in space)
        raise UserError(
            f"All {len(trials)} trials diverged, at learning rates from {rates[0]:.3g} to {rates[-1]:.3g} and weight "
            f"decays from {decays[0]:.3g} to {decays[-1]:.3g}. Give this search's learning_rate and weight_decay "
            "smaller bounds in params.yaml."
        )
    # Of equals, and on a small validation split there are many, the one whose weights shrink most.
    best = max(going, key=lambda trial: (trial["score"], _shrinking(trial["learning_rate"] * trial["weight_decay"])))
    return {"best": {name: best[name] for name in space}, "score": best["score"], "trials": trials}


def _ask(trials: Sequence[dict], space: dict, count: int, described: SearchConfig) -> list[dict]:
    """A round's settings: the first half of all trials random, then by TPE from those before."""
    # A seed a round, since a sampler's state does not outlive its process.
    seed = int(np.random.SeedSequence([described.seed, len(trials)]).generate_state(1)[0])
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    sampler = optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=described.trials // 2, multivariate=True, constant_liar=True
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in trials:
        params = {name: trial[name] for name in space}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=trial["score"]))
    return [study.ask(space).params for _ in range(count)]


def _shrinking(share: float) -> float:
    """How much AdamW shrinks weights of which it takes a share each step: to 0 by 1, and by more than 2 they grow."""
    return share if share < 1 else 2 - share


def _kept(study: Path | None, key: str) -> list[dict]:
    """Trials of finished rounds; none if the study is not there, torn, or about something else."""
    try:
        found = json.loads(study.read_bytes()) if study else {}
    except (FileNotFoundError, ValueError):  # neither JSON nor even text
        return []
    return found["trials"] if isinstance(found, dict) and found.get("key") == key else []


def _code() -> str:
    """Digest of what trains: trials of other code are not gone on with."""
    folder = Path(__file__).parents[1]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))).hexdigest()
