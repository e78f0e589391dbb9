"""The search over learning rate and weight decay: Optuna's TPE, asked for several trials at a time."""

from collections.abc import Callable, Sequence

import optuna

from pipeline.fit import Setting
from pipeline.params import Search


def search(score: Callable[[Sequence[Setting]], Sequence[float]], described: Search) -> dict:
    """Search for the setting with the best validation score.

    Args:
        score: validation scores of heads trained with the given settings, together.
        described: numbers of trials and bounds.

    Returns:
        `best`, the learning rate and weight decay; `score`, theirs on validation; and all `trials`.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=described.seed, n_startup_trials=described.trials // 2)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    space = {
        name: optuna.distributions.FloatDistribution(*getattr(described, name), log=True)
        for name in ("learning_rate", "weight_decay")
    }
    while (left := described.trials - len(study.trials)) > 0:
        asked = [study.ask(space) for _ in range(min(described.parallel, left))]
        # Every trial has the same seed, so that trials differ in their settings alone.
        scores = score([Setting(**trial.params, seed=described.seed) for trial in asked])
        for trial, value in zip(asked, scores, strict=True):
            study.tell(trial, float(value))
    trials = [{**trial.params, "score": trial.value} for trial in study.trials]
    return {"best": study.best_params, "score": study.best_value, "trials": trials}
