"""What several backbones say at the same places: the chips of a classification set, or pixels of masks.

Probes and CKA compare backbones on these, whatever the sizes of their grids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from cache.reader import FeatureStore
from pipeline.training import feature_inputs

# How many points are looked at: chips, or pixels, spread evenly over a split's masks. Twice as many pixels cost twice
# the time and move a probe's mean IoU by .01 (LAB.md).
MAX_CHIPS, MAX_PIXELS = 8192, 4096
# Samples read at once.
_STEP = 32


# A backbone and one of its levels or pooled vectors.
Layer = tuple[str, str]


@dataclass(frozen=True)
class ProbeSamples:
    """Features of the same points by several backbones.

    Attributes:
        features: by layer, float32 (point, channel).
        label: (point,), or (point, class) of a multi-label set.
    """

    features: dict[Layer, np.ndarray]
    label: np.ndarray

    def concatenate(self, layers: Sequence[Layer], some: slice = slice(None)) -> np.ndarray:
        """Layers side by side, (point, channel), of all points or some."""
        return np.concatenate([self.features[layer][some] for layer in layers], axis=1)


def chip_samples(members: Mapping[str, FeatureStore], rows: np.ndarray, label: np.ndarray) -> ProbeSamples:
    """All pooled vectors of a classification set's samples `rows`."""
    features = {
        (name, layer): feature_inputs.read_finite(store, f"pooled/{layer}", rows)
        for name, store in members.items()
        for layer in store.pooled
    }
    return ProbeSamples(features, label)


def pixel_samples(
    members: Mapping[str, FeatureStore], rows: np.ndarray, masks: np.ndarray, ignore: int, seed: int
) -> ProbeSamples:
    """Levels of a segmentation set at labelled pixels drawn from each mask, about PIXELS in all.

    Levels are read between cells bilinearly, as heads resize them.

    Args:
        masks: (len(rows), y, x); pixels that equal `ignore` are never drawn.
        seed: of the drawing.
    """
    picked, valid = _draw(masks, ignore, seed)
    features = {}
    for name, store in members.items():
        for level in store.levels:
            parts = []
            for start in range(0, len(rows), _STEP):
                some = slice(start, start + _STEP)
                maps = torch.from_numpy(feature_inputs.read_finite(store, f"{level}/features", rows[some]))
                parts.append(_sampled(maps, picked[some], masks.shape[1:])[valid[some]])
            features[name, level] = np.concatenate(parts)
    flat = masks.reshape(len(masks), -1)
    return ProbeSamples(features, np.take_along_axis(flat, picked, axis=1)[valid].astype(np.int64))


def _draw(masks: np.ndarray, ignore: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Flat places of pixels in each mask, (mask, place), and which of them count, where a mask has too few."""
    each = -(-MAX_PIXELS // len(masks))
    generator = np.random.default_rng(seed)
    places, valid = np.zeros((len(masks), each), np.int64), np.zeros((len(masks), each), bool)
    for position, mask in enumerate(masks.reshape(len(masks), -1)):
        labelled = np.flatnonzero(mask != ignore)
        drawn = np.sort(generator.permutation(labelled)[:each])
        places[position, : len(drawn)], valid[position, : len(drawn)] = drawn, True
    return places, valid


def _sampled(maps: torch.Tensor, places: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Maps (sample, channel, y, x) at pixels of masks of another size, (sample, place, channel)."""
    y, x = (torch.from_numpy(axis).float() for axis in np.unravel_index(places, size))
    grid = torch.stack([(2 * x + 1) / size[1] - 1, (2 * y + 1) / size[0] - 1], dim=-1)[:, None]
    sampled = functional.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    return sampled[:, :, 0].transpose(1, 2).numpy()
