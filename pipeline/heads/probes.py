"""Quick deterministic probes by scikit-learn: logistic regression by L-BFGS, and nearest neighbours.

Nothing is drawn at random and nothing is searched but the strength of the penalty, so a probe ranks features in
seconds. Its scores are another protocol's than the heads', and are not mixed with theirs. Whoever wants the same last
digits on every machine, and speed, gives BLAS one thread (threadpoolctl).
"""

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

# Penalties tried, strongest first: half the squared weights times this, beside the mean loss of a sample.
PENALTIES = (10.0, 1.0, 0.1, 0.01, 0.001)
NEIGHBOURS = 5
# Ten times scikit-learn's own tolerance: nearly half the time, and at most one validation chip of 197 (LAB.md).
_STEPS, _TOLERANCE = 1000, 1e-3


@dataclass(frozen=True)
class LinearProbe:
    """A linear probe: weight (class, channel), bias (class,)."""

    weight: np.ndarray
    bias: np.ndarray

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """(sample, class) from inputs (sample, channel)."""
        return inputs @ self.weight.T + self.bias


def fit_logistic(kind: str, inputs: np.ndarray, label: np.ndarray, classes: int) -> list[LinearProbe]:
    """Logistic regressions, one a penalty of PENALTIES, each begun where the one before ended.

    Args:
        kind: of task; a multi-label one is as many regressions as classes.
        inputs: standardised, float (sample, channel).
        label: class index (sample,), or multi-hot (sample, class).
    """
    if kind != "multilabel":
        return _path(inputs, label, classes)
    each = [_path(inputs, column, 2) for column in label.T]
    # Of two classes' logits the difference is what a threshold at zero is set on.
    return [
        LinearProbe(
            np.stack([path[i].weight[1] - path[i].weight[0] for path in each]),
            np.array([path[i].bias[1] - path[i].bias[0] for path in each]),
        )
        for i in range(len(PENALTIES))
    ]


def predict_knn(inputs: np.ndarray, label: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Labels (query,) or (query, class) by the vote of the nearest training samples, by Euclidean distance."""
    votes = KNeighborsClassifier(min(NEIGHBOURS, len(inputs)), algorithm="brute").fit(inputs, label).predict(queries)
    return votes.reshape(len(queries), *label.shape[1:])  # of a single class scikit-learn gives a vector


def predicted(kind: str, logits: np.ndarray) -> np.ndarray:
    """What logits (sample, class) say: class index (sample,), or multi-hot (sample, class)."""
    return (logits > 0).astype(np.int64) if kind == "multilabel" else logits.argmax(axis=1)


def _path(inputs: np.ndarray, label: np.ndarray, classes: int) -> list[LinearProbe]:
    present = np.unique(label)
    # A class that the training samples lack is never predicted.
    weight, bias = np.zeros((classes, inputs.shape[1]), inputs.dtype), np.full(classes, -1e9, inputs.dtype)
    if len(present) == 1:
        bias[present] = 0
        return [LinearProbe(weight, bias)] * len(PENALTIES)
    found, model = [], LogisticRegression(max_iter=_STEPS, tol=_TOLERANCE, warm_start=True)
    for penalty in PENALTIES:
        model.set_params(C=1 / (penalty * len(inputs))).fit(inputs, label)
        weight, bias = weight.copy(), bias.copy()
        # scikit-learn keeps one row for two classes: the second's logit above the first's.
        weight[present], bias[present] = (
            (np.stack([np.zeros_like(model.coef_[0]), model.coef_[0]]), [0, model.intercept_[0]])
            if len(present) == 2
            else (model.coef_, model.intercept_)
        )
        found.append(LinearProbe(weight, bias))
    return found
