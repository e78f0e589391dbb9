"""Deterministic probes by scikit-learn: logistic regression by L-BFGS, and nearest neighbours.

A probe ranks features in seconds: nothing is random, and only the strength of the penalty is searched. Its scores are
of another protocol than the heads' and are not mixed with theirs. For the same floating-point rounding on every
machine, and for speed, limit BLAS to one thread (threadpoolctl).
"""

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from pipeline.tasks import Task

# Penalties, strongest first: the factor of half the squared weights, added to the mean loss of a sample.
PENALTIES = (10.0, 1.0, 0.1, 0.01, 0.001)
NEIGHBOURS = 5
MAX_ITERATIONS = 1000
# Ten times scikit-learn's own tolerance: nearly half the time; at most one validation chip of 197 differs (LAB.md).
TOLERANCE = 1e-3
# Bias of a class without training samples: it is never predicted.
ABSENT_CLASS_BIAS = -1e9


@dataclass(frozen=True)
class LinearProbe:
    """A linear probe: weight (class, channel), bias (class,)."""

    weight: np.ndarray
    bias: np.ndarray

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """Compute logits (sample, class) from inputs (sample, channel)."""
        return inputs @ self.weight.T + self.bias


def fit_logistic(task: Task, inputs: np.ndarray, label: np.ndarray) -> list[LinearProbe]:
    """Fit one logistic regression per penalty of `PENALTIES`, each starting where the one before ended.

    Args:
        task: for a multi-label task, every class has its own regression.
        inputs: standardized features, float (sample, channel).
        label: class index (sample,), or multi-hot (sample, class).
    """
    if not task.is_multilabel:
        return _fit_penalties(inputs, label, task.n_classes)
    probes_of_class = [_fit_penalties(inputs, column, 2) for column in label.T]
    # The difference of the two logits (absent, present) is compared with zero.
    return [
        LinearProbe(
            np.stack([probes[i].weight[1] - probes[i].weight[0] for probes in probes_of_class]),
            np.array([probes[i].bias[1] - probes[i].bias[0] for probes in probes_of_class]),
        )
        for i in range(len(PENALTIES))
    ]


def predict_knn(inputs: np.ndarray, label: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Predict labels (query,) or (query, class) by the vote of the nearest training samples."""
    classifier = KNeighborsClassifier(min(NEIGHBOURS, len(inputs)), algorithm="brute")
    votes = classifier.fit(inputs, label).predict(queries)
    return votes.reshape(len(queries), *label.shape[1:])  # for a single class scikit-learn returns a vector


def _fit_penalties(inputs: np.ndarray, label: np.ndarray, n_classes: int) -> list[LinearProbe]:
    """Fit one regression per penalty; `label` (sample,)."""
    present = np.unique(label)
    weight = np.zeros((n_classes, inputs.shape[1]), inputs.dtype)
    bias = np.full(n_classes, ABSENT_CLASS_BIAS, inputs.dtype)
    if len(present) == 1:
        bias[present] = 0
        return [LinearProbe(weight, bias)] * len(PENALTIES)
    probes, model = [], LogisticRegression(max_iter=MAX_ITERATIONS, tol=TOLERANCE, warm_start=True)
    for penalty in PENALTIES:
        model.set_params(C=1 / (penalty * len(inputs))).fit(inputs, label)
        weight, bias = weight.copy(), bias.copy()
        # For two classes scikit-learn has one row: the second class's logit minus the first's.
        weight[present], bias[present] = (
            (np.stack([np.zeros_like(model.coef_[0]), model.coef_[0]]), [0, model.intercept_[0]])
            if len(present) == 2
            else (model.coef_, model.intercept_)
        )
        probes.append(LinearProbe(weight, bias))
    return probes
