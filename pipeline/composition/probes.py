"""Probes of backbones' cached features, fitted on training points and scored on the validation split."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler
from torch.nn import functional

from cache.reader import FeatureStore
from pipeline import metrics
from pipeline.composition import cka
from pipeline.composition.points import Layer, ProbeSamples
from pipeline.heads import probes
from pipeline.training.loop import Task

# Samples whose levels are read at once; points whose products are made at once.
_SAMPLES, _BLOCK = 8, 2048


class Probe:
    """Probes fitted on training points and scored on validation points.

    Args:
        train, val: points of the two splits; every channel is standardised by the training points.
        task: what is asked.
        kind: `logistic` or `knn`.

    Attributes:
        layers: those of the points.
        scalers: what standardised them.
    """

    def __init__(self, train: ProbeSamples, val: ProbeSamples, task: Task, method: str):
        self.task, self.kind, self.layers = task, method, list(train.features)
        self.scalers = {layer: StandardScaler().fit(values) for layer, values in train.features.items()}
        self._train, self._val = (
            ProbeSamples(
                {layer: self.scalers[layer].transform(values) for layer, values in one.features.items()}, one.label
            )
            for one in (train, val)
        )

    def width(self, layer: Layer) -> int:
        """Channels of a layer."""
        return len(self.scalers[layer].mean_)

    def fit(self, layers: Sequence[Layer]) -> tuple[float, probes.LinearProbe | None]:
        """The validation score of a probe on these layers side by side, and the probe, if it is linear.

        Of the logistic regressions the one with the best penalty by that score.
        """
        kind, inputs, label = self.task.type, self._train.concatenate(layers), self._train.label
        queries = self._val.concatenate(layers)
        if self.kind == "knn":
            return self._score(probes.predict_knn(inputs, label, queries)), None
        found = probes.fit_logistic(kind, inputs, label, self.task.n_classes)
        scores = [self._score(probes.predicted(kind, one.logits(queries))) for one in found]
        best = int(np.argmax(scores))
        return scores[best], found[best]

    def similarity(self, groups: Mapping[str, Sequence[Layer]]) -> tuple[list[str], np.ndarray]:
        """Linear CKA between groups of layers side by side, on the training points."""
        count = len(self._train.label)

        def batches():
            for start in range(0, count, _BLOCK):
                some = slice(start, start + _BLOCK)
                yield {name: self._train.concatenate(layers, some) for name, layers in groups.items()}

        return cka.linear_cka(batches)

    def _score(self, predicted: np.ndarray) -> float:
        counts = metrics.counts(self.task.type, predicted, self._val.label, self.task.n_classes, self.task.ignore_value)
        return float(metrics.score(self.task.type, counts.sum(axis=0), self.task.n_classes))


def mask_scores(
    fitted: Mapping[tuple[str, ...], tuple[list[Layer], probes.LinearProbe]],
    probe: Probe,
    members: Mapping[str, FeatureStore],
    rows: np.ndarray,
    masks: np.ndarray,
) -> dict[tuple[str, ...], float]:
    """Mean IoU of linear probes over whole masks: every level is read once for all of them.

    A linear probe and a bilinear resize may change places, so each level is reduced to logits on its own grid and
    those are resized and added: the features are never held at the size of the mask.

    Args:
        fitted: by ensemble, the layers it reads and the probe that `Probe.fit` gave.
        masks: (len(rows), y, x).
    """
    task, totals = probe.task, {}
    pieces = {name: _by_layer(layers, linear, probe.scalers) for name, (layers, linear) in fitted.items()}
    for start in range(0, len(rows), _SAMPLES):
        some = slice(start, start + _SAMPLES)
        maps = {}
        for layer in probe.scalers:
            read = members[layer[0]].read(f"{layer[1]}/features", rows[some])
            maps[layer] = torch.from_numpy(read.astype(np.float32))
        for name, (weights, bias) in pieces.items():
            logits = torch.from_numpy(bias)[:, None, None]
            for layer, weight in weights.items():
                coarse = torch.einsum("kc,ncyx->nkyx", torch.from_numpy(weight), maps[layer])
                logits = logits + functional.interpolate(coarse, size=masks.shape[1:], mode="bilinear")
            predicted = logits.max(dim=1).indices.numpy()
            counts = metrics.counts(task.type, predicted, masks[some], task.n_classes, task.ignore_value)
            totals[name] = totals.get(name, 0) + counts.sum(axis=0)
    return {name: float(metrics.score(task.type, total, task.n_classes)) for name, total in totals.items()}


def _by_layer(layers: Sequence[Layer], linear: probes.LinearProbe, scalers) -> tuple[dict[Layer, np.ndarray], np.ndarray]:
    """A probe's weights a layer, and its bias, for features as they are stored."""
    weights, bias, start = {}, linear.bias.astype(np.float64), 0
    for layer in layers:
        scaler = scalers[layer]
        weight = linear.weight[:, start : start + len(scaler.mean_)] / scaler.scale_
        bias = bias - weight @ scaler.mean_
        weights[layer] = weight.astype(np.float32)
        start += len(scaler.mean_)
    return weights, bias.astype(np.float32)
