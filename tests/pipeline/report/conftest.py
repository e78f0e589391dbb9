"""Runs and bootstrap samples of models whose true accuracies are known."""

import numpy as np
import pandas as pd
import pytest

from pipeline.composition.search import CompositionResult
from pipeline.report.significance import bootstrap, summarize_runs
from pipeline.report.statements import FINE_TUNED_SUFFIX
from pipeline.tasks import Classification

TASK = Classification(2)


@pytest.fixture
def grid():
    """Runs and draws of five models on dataset d; their true accuracies are in the loop."""
    label = np.random.default_rng(0).integers(2, size=300)
    runs, draws = [], {}
    for model, weights, accuracy in (
        ("a", "pretrained", 0.9),
        ("b", "pretrained", 0.6),
        ("a_random", "random, seed 0", 0.5),
        ("a+b", "p+p", 0.9),
        ("a+c", "p+p", 0.9),
    ):
        generator = np.random.default_rng(sum(map(ord, model)))
        is_wrong = generator.random((3, 300)) > accuracy
        counts = np.stack([TASK.counts(np.where(wrong, 1 - label, label), label) for wrong in is_wrong])
        draws["d", model] = bootstrap(TASK, counts, stream=len(draws))
        for seed, score in enumerate(TASK.score(counts.sum(1))):
            runs.append(
                {"dataset": "d", "model": model, "weights": weights, "protocol": "frozen", "task": "classification",
                 "seed": seed, "metric": "accuracy", "score": score, "val_score": score, "n_test": 300, "classes": 2,
                 "learning_rate": 0.1, "weight_decay": 0.1}
            )  # fmt: skip
    return pd.DataFrame(runs), draws


@pytest.fixture
def summary(grid):
    """Summary of the grid."""
    return summarize_runs(*grid)


@pytest.fixture
def grid_with_fine_tuned(grid):
    """The grid with b fine-tuned too, which is always right."""
    runs, draws = grid
    label = np.random.default_rng(0).integers(2, size=300)
    counts = np.stack([TASK.counts(label, label)] * 3)
    model = "b" + FINE_TUNED_SUFFIX
    fine_tuned = runs[runs.model == "b"].assign(
        protocol="fine-tuned (lora)", model=model, score=1.0, val_score=0.9, learning_rate=1e-3, frozen_val_score=0.6,
        best_step=40, trained_parameters=1234,
    )  # fmt: skip
    draws = draws | {("d", model): bootstrap(TASK, counts, stream=9)}
    return pd.concat([runs, fine_tuned], ignore_index=True), draws


@pytest.fixture
def compositions():
    """Results of the composition search on two datasets, of which e has no backbones to combine."""
    cka = pd.DataFrame(
        [
            {"level": level, "backbone_a": a, "backbone_b": b, "cka": 1.0 if a == b else 0.25}
            for level in ("level0", "all")
            for a in "ab"
            for b in "ab"
        ]
    )
    subsets = pd.DataFrame(
        {"model": ["b+a", "a", "b"], "members": [2, 1, 1], "channels": [9, 4, 5], "score": [0.9, 0.8, 0.7],
         "gain": [0.1, np.nan, np.nan], "cka": [0.25, np.nan, np.nan]}
    )  # fmt: skip
    greedy = pd.DataFrame({"backbone": ["a"], "layer": ["level0"], "score": [0.8]})
    return {
        "d": CompositionResult(backbones=("a", "b"), probe="logistic", subsets=subsets, cka=cka, greedy=greedy),
        "e": CompositionResult(skipped=("a needs <nir>.",)),
    }
