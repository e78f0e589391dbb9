"""Fit probes on cached features of the training split and score them on the validation split.

A probe ranks features in seconds: logistic regression by L-BFGS, or nearest neighbours, both by scikit-learn.
Nothing is random, and only the strength of the penalty is searched. Its scores follow another protocol than the
heads' and are not compared with them. For the same floating-point rounding on every machine, and for speed, limit
BLAS to one thread (threadpoolctl).

The samples are the chips of a classification dataset, or pixels of the masks of a segmentation dataset. All backbones
are compared on the same samples, whatever the sizes of their feature grids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch.nn import functional

from cache.reader import FeatureStore
from cache.schema import level_array, pooled_array
from pipeline.composition.cka import linear_cka
from pipeline.tasks import IGNORE, Task
from pipeline.training import feature_loader

# Penalties, strongest first: the factor of half the squared weights, added to the mean loss of a sample.
PENALTIES = (10.0, 1.0, 0.1, 0.01, 0.001)
NEIGHBOURS = 5
MAX_ITERATIONS = 1000
# Ten times scikit-learn's default: nearly half the time; at most one validation chip of 197 differs (LAB.md).
TOLERANCE = 1e-3
# Bias of a class without training samples: it is never predicted.
ABSENT_CLASS_BIAS = -1e9
# Chips per split, at most.
MAX_CHIPS = 8192
# Pixels per split, about, spread evenly over its masks. Twice as many pixels cost twice the time and move the mean
# IoU of a probe by .01 (LAB.md).
MAX_PIXELS = 4096
# Samples whose feature maps are read together to draw pixels, and to score masks.
READ_SAMPLES, SCORE_SAMPLES = 32, 8


# Samples


class Layer(NamedTuple):
    """A level or pooled vector of a backbone: name of the backbone, and path of the array in its store."""

    backbone: str
    array: str


@dataclass(frozen=True)
class ProbeSamples:
    """Features (sample, channel), float32, of the same samples by several backbones, and their labels."""

    features: dict[Layer, np.ndarray]
    label: np.ndarray

    def concatenate(self, layers: Sequence[Layer]) -> np.ndarray:
        return np.concatenate([self.features[layer] for layer in layers], axis=1)


def chip_samples(stores: Mapping[str, FeatureStore], rows: np.ndarray, label: np.ndarray) -> ProbeSamples:
    """Read all pooled vectors of the chips in these rows of the backbones' stores."""
    features = {
        Layer(backbone, pooled_array(name)): feature_loader.read_finite(store, pooled_array(name), rows)
        for backbone, store in stores.items()
        for name in store.pooled
    }
    return ProbeSamples(features, label)


def pixel_samples(stores: Mapping[str, FeatureStore], rows: np.ndarray, masks: np.ndarray, seed: int) -> ProbeSamples:
    """Read all levels at random labelled pixels of the masks (len(rows), y, x), about MAX_PIXELS in all.

    Levels are interpolated bilinearly between cells, as heads resize them.
    """
    pixels, is_valid = _draw_pixels(masks, seed)
    features = {}
    for backbone, store in stores.items():
        for array in map(level_array, range(len(store.levels))):
            values = []
            for batch in _batches(len(rows), READ_SAMPLES):
                maps = torch.from_numpy(feature_loader.read_finite(store, array, rows[batch]))
                values.append(_interpolate(maps, pixels[batch], masks.shape[1:])[is_valid[batch]])
            features[Layer(backbone, array)] = np.concatenate(values)
    flat_masks = masks.reshape(len(masks), -1)
    return ProbeSamples(features, np.take_along_axis(flat_masks, pixels, axis=1)[is_valid].astype(np.int64))


def _batches(n_rows: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n_rows, size)]


def _draw_pixels(masks: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw flat indices (mask, pixel) of labelled pixels; `is_valid` is False where a mask has too few."""
    n_pixels = -(-MAX_PIXELS // len(masks))
    generator = np.random.default_rng(seed)
    pixels, is_valid = np.zeros((len(masks), n_pixels), np.int64), np.zeros((len(masks), n_pixels), bool)
    for index, mask in enumerate(masks.reshape(len(masks), -1)):
        drawn = np.sort(generator.permutation(np.flatnonzero(mask != IGNORE))[:n_pixels])
        pixels[index, : len(drawn)], is_valid[index, : len(drawn)] = drawn, True
    return pixels, is_valid


def _interpolate(maps: torch.Tensor, pixels: np.ndarray, mask_size: tuple[int, int]) -> np.ndarray:
    """Interpolate maps at flat indices (sample, pixel) in masks of another size, (sample, pixel, channel)."""
    y, x = (torch.from_numpy(axis).float() for axis in np.unravel_index(pixels, mask_size))
    grid = torch.stack([(2 * x + 1) / mask_size[1] - 1, (2 * y + 1) / mask_size[0] - 1], dim=-1)[:, None]
    values = functional.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    return values[:, :, 0].transpose(1, 2).numpy()


# Logistic regression and nearest neighbours


@dataclass(frozen=True)
class LinearProbe:
    """A linear probe: weight (class, channel), bias (class,)."""

    weight: np.ndarray
    bias: np.ndarray

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        return inputs @ self.weight.T + self.bias


def fit_logistic(task: Task, inputs: np.ndarray, label: np.ndarray) -> list[LinearProbe]:
    """Fit one logistic regression per penalty of `PENALTIES`, each starting where the one before ended.

    In a multi-label task every class has its own regression. `inputs` are standardized.
    """
    if not task.is_multilabel:
        return _fit_penalties(inputs, label, task.n_classes)
    probes_of_class = [_fit_penalties(inputs, column, 2) for column in label.T]
    # The logit of a class is that of `present` minus that of `absent`.
    return [
        LinearProbe(
            np.stack([probe.weight[1] - probe.weight[0] for probe in probes]),
            np.array([probe.bias[1] - probe.bias[0] for probe in probes]),
        )
        for probes in zip(*probes_of_class, strict=True)
    ]


def _fit_penalties(inputs: np.ndarray, label: np.ndarray, n_classes: int) -> list[LinearProbe]:
    """Fit one regression per penalty; `label` (sample,)."""
    present = np.unique(label)
    weight = np.zeros((n_classes, inputs.shape[1]), inputs.dtype)
    bias = np.full(n_classes, ABSENT_CLASS_BIAS, inputs.dtype)
    bias[present] = 0
    if len(present) == 1:
        return [LinearProbe(weight, bias)] * len(PENALTIES)
    # For two classes scikit-learn has one row: the second class's logit minus the first's.
    classes = present if len(present) > 2 else present[1:]
    probes, model = [], LogisticRegression(max_iter=MAX_ITERATIONS, tol=TOLERANCE, warm_start=True)
    for penalty in PENALTIES:
        model.set_params(C=1 / (penalty * len(inputs))).fit(inputs, label)
        weight, bias = weight.copy(), bias.copy()
        weight[classes], bias[classes] = model.coef_, model.intercept_
        probes.append(LinearProbe(weight, bias))
    return probes


def predict_knn(inputs: np.ndarray, label: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Predict labels (query,) or (query, class) by the vote of the nearest training samples."""
    classifier = KNeighborsClassifier(min(NEIGHBOURS, len(inputs)), algorithm="brute")
    votes = classifier.fit(inputs, label).predict(queries)
    return votes.reshape(len(queries), *label.shape[1:])  # for a single class scikit-learn returns a vector


# Fits and scores


class Probe:
    """Fit probes on training samples and score them on validation samples.

    Every channel is standardized by the training samples. `method` is `logistic` or `knn`.
    """

    def __init__(self, train: ProbeSamples, val: ProbeSamples, task: Task, method: str):
        self.task, self.method, self.layers = task, method, list(train.features)
        self.scalers = {layer: StandardScaler().fit(values) for layer, values in train.features.items()}
        self._train, self._val = self._standardize(train), self._standardize(val)

    def _standardize(self, samples: ProbeSamples) -> ProbeSamples:
        features = {layer: self.scalers[layer].transform(values) for layer, values in samples.features.items()}
        return ProbeSamples(features, samples.label)

    def width(self, layer: Layer) -> int:
        return self.scalers[layer].n_features_in_

    def fit(self, layers: Sequence[Layer]) -> tuple[float, LinearProbe | None]:
        """Fit a probe on concatenated layers; return its validation score, and its weights if logistic."""
        inputs, label = self._train.concatenate(layers), self._train.label
        val_inputs = self._val.concatenate(layers)
        if self.method == "knn":
            return self._score(predict_knn(inputs, label, val_inputs)), None
        candidates = fit_logistic(self.task, inputs, label)
        scores = [self._score(self.task.predict(candidate.logits(val_inputs))) for candidate in candidates]
        best = int(np.argmax(scores))
        return scores[best], candidates[best]

    def similarity(self, groups: Mapping[str, Sequence[Layer]]) -> pd.DataFrame:
        """Compute linear CKA between groups of concatenated layers, on the training samples."""
        return linear_cka({name: self._train.concatenate(layers) for name, layers in groups.items()})

    def _score(self, predicted: np.ndarray) -> float:
        counts = self.task.counts(predicted, self._val.label)
        return float(self.task.score(counts.sum(axis=0)))


def mask_scores(
    fitted: Mapping[tuple[str, ...], tuple[list[Layer], LinearProbe]], probe: Probe,
    stores: Mapping[str, FeatureStore], rows: np.ndarray, masks: np.ndarray,
) -> dict[tuple[str, ...], float]:  # fmt: skip
    """Score linear probes by the mean IoU over whole masks; every level is read once for all of them.

    A linear probe and a bilinear resize commute. The logits of each level are therefore computed on its own grid,
    resized and added, and the features are never in memory at the size of the masks.

    Args:
        fitted: by ensemble, its layers and its probe from `Probe.fit`.
        rows, masks: of the samples, as for `pixel_samples`.
    """
    task, total_counts = probe.task, dict.fromkeys(fitted, 0)
    weights_of = {names: _split_by_layer(layers, linear, probe.scalers) for names, (layers, linear) in fitted.items()}
    for batch in _batches(len(rows), SCORE_SAMPLES):
        maps = {
            layer: torch.from_numpy(stores[layer.backbone].read(layer.array, rows[batch]).astype(np.float32))
            for layer in probe.scalers
        }
        for names, (weights, bias) in weights_of.items():
            logits = torch.from_numpy(bias)[:, None, None]
            for layer, weight in weights.items():
                low_res_logits = torch.einsum("kc,ncyx->nkyx", torch.from_numpy(weight), maps[layer])
                logits = logits + functional.interpolate(low_res_logits, size=masks.shape[1:], mode="bilinear")
            predicted = logits.max(dim=1).indices.numpy()
            total_counts[names] += task.counts(predicted, masks[batch]).sum(axis=0)
    return {names: float(task.score(counts)) for names, counts in total_counts.items()}


def _split_by_layer(
    layers: Sequence[Layer], linear: LinearProbe, scalers: Mapping[Layer, StandardScaler]
) -> tuple[dict[Layer, np.ndarray], np.ndarray]:
    """Split a probe into the weights of each layer and the bias, for features as they are stored."""
    ends = np.cumsum([scalers[layer].n_features_in_ for layer in layers])
    weights, bias = {}, linear.bias.astype(np.float64)
    for layer, weight in zip(layers, np.split(linear.weight, ends[:-1], axis=1), strict=True):
        weight = weight / scalers[layer].scale_
        bias = bias - weight @ scalers[layer].mean_
        weights[layer] = weight.astype(np.float32)
    return weights, bias.astype(np.float32)
