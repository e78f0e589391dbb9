"""Joining the features of several backbones: standardise each, align their grids, concatenate channels.

Concatenation along channels is the paper's composition (arXiv 2506.20174, section 3). Each backbone is
standardised with its own training statistics first, or one model's scale would drown the other's.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from cache.read import Features

# A channel that varies less than this share of its mean in training is a dead unit and is left at zero.
DEAD = 1e-5


def pooled(
    stores: Sequence[Features], which: str, tokens: str, index: np.ndarray, training: np.ndarray
) -> torch.Tensor:
    """Fused pooled vectors, float32 (len(index), channel).

    Args:
        stores: of the model's members, aligned.
        which: `last` takes each backbone's deepest vectors, `all` takes all of them.
        tokens: `mean`, `cls` or `both`, of those that have class tokens; others give their means.
        index: rows wanted.
        training: rows whose mean and standard deviation standardise every channel.
    """
    parts = []
    for store in stores:
        for name in chosen(store.pooled, which, tokens):
            reference = store.read(f"pooled/{name}", training).astype(np.float64)
            values = store.read(f"pooled/{name}", index)
            parts.append(_standardise(values, reference.mean(axis=0), reference.std(axis=0)))
    return torch.from_numpy(np.concatenate(parts, axis=1))


def pyramid(stores: Sequence[Features], index: np.ndarray) -> list[torch.Tensor]:
    """Fused levels, each float32 (len(index), channel, y, x), finest first.

    Raises:
        ValueError: the members have different numbers of levels.
    """
    levels = []
    for names in zip(*[store.levels for store in stores], strict=True):
        parts = []
        for store, name in zip(stores, names, strict=True):
            mean, std = (values[:, None, None] for values in store.statistics(name))
            parts.append(torch.from_numpy(_standardise(store.read(f"{name}/features", index), mean, std)))
        levels.append(torch.cat(align(parts), dim=1))
    return levels


def align(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Bring maps (sample, channel, y, x) to the finest of their grids, bilinearly."""
    finest = max((part.shape[-2:] for part in parts), key=lambda size: size[0] * size[1])
    return [
        part if part.shape[-2:] == finest else functional.interpolate(part, size=finest, mode="bilinear")
        for part in parts
    ]


def chosen(names: Sequence[str], which: str, tokens: str) -> list[str]:
    """Names of pooled vectors: of one kind or both, all or the deepest of each kind."""
    kinds = [[name for name in names if name.startswith("cls_") == cls] for cls in (False, True)]
    means, classes = kinds if kinds[1] else (kinds[0], kinds[0])
    taken = {"mean": [means], "cls": [classes], "both": [kind for kind in kinds if kind]}[tokens]
    return [name for kind in taken for name in (kind[-1:] if which == "last" else kind)]


def _standardise(values: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    alive = std > DEAD * np.abs(mean)
    scaled = (values.astype(np.float32) - mean.astype(np.float32)) / np.where(alive, std, 1).astype(np.float32)
    return np.where(alive, scaled, np.float32(0))
