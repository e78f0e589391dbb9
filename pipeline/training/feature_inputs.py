"""Joining the features of several backbones: which arrays, and each standardised by itself.

Concatenation along channels is the paper's composition (arXiv 2506.20174, section 3). Each backbone is
standardised with its own training statistics first, or one model's scale would drown the other's. Grids that differ
meet inside the head (pipeline/heads/fusion.py), never in stored or loaded memory.
"""

from collections.abc import Sequence

import numpy as np
import torch

from cache.errors import StoreError
from cache.files import VERIFY_HINT
from cache.reader import FeatureStore

# A channel that varies less than this share of its mean in training is a dead unit and is left at zero.
DEAD = 1e-5
# Rows read at once for statistics.
STEP = 4096

# An array of a store.
Field = tuple[FeatureStore, str]
# Mean and standard deviation of its channels in the training split.
Statistics = tuple[np.ndarray, np.ndarray]


def select_pooled(stores: Sequence[FeatureStore], which: str, tokens: str, levels: Sequence[int] = ()) -> list[list[Field]]:
    """The pooled vectors of each member.

    Args:
        which: `last` takes each backbone's deepest vectors, `all` takes all of them.
        tokens: `mean`, `cls` or `both`, of those that have class tokens; others give their means.
        levels: of these levels alone, 0 the finest, -1 the deepest; empty for all.

    Raises:
        StoreError: a backbone without such a level.
    """
    return [[(store, f"pooled/{name}") for name in _chosen(store.pooled, which, tokens, levels)] for store in stores]


def select_levels(stores: Sequence[FeatureStore], levels: Sequence[int] = ()) -> list[list[Field]]:
    """The levels of each member, finest first; `levels` as for `vectors`.

    Raises:
        StoreError: a store without levels, or without one of those asked for.
    """
    for store in stores:
        if not store.levels:
            raise StoreError(f"{store.location} holds no levels, which a segmentation head needs. Extract it again.")
    return [[(store, f"{name}/features") for name in _picked(store.levels, levels)] for store in stores]


def channel_stats(field: Field, training: np.ndarray) -> Statistics:
    """Mean and standard deviation of an array's channels over the training rows, float64 (channel,).

    Raises:
        StoreError: a pooled vector has values that are no numbers.
    """
    store, name = field
    if not name.startswith("pooled/"):  # the writer has computed them from the same rows
        return store.statistics(name.removesuffix("/features"))
    parts = [training[start : start + STEP] for start in range(0, len(training), STEP)]
    mean = sum(store.read(name, part).sum(axis=0, dtype=np.float64) for part in parts) / len(training)
    square = sum(((store.read(name, part).astype(np.float64) - mean) ** 2).sum(axis=0) for part in parts)
    if not np.isfinite(square).all():
        raise StoreError(nonfinite_message(store, name))
    return mean, np.sqrt(square / len(training))


def read_finite(store: FeatureStore, name: str, index: np.ndarray) -> np.ndarray:
    """Rows of an array as they are stored, float32.

    Raises:
        StoreError: values that are no numbers.
    """
    values = store.read(name, index).astype(np.float32)
    if not np.isfinite(values).all():
        raise StoreError(nonfinite_message(store, name))
    return values


def nonfinite_message(store: FeatureStore, name: str) -> str:
    """What to say of an array with values that are no numbers."""
    return f"{store.location}: {name} has values that are no numbers. {VERIFY_HINT}; if it is whole, extract in float32."


def to_mean_scale(mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What to take off and what to multiply by, float32 (channel,); a dead channel is multiplied by zero."""
    alive = std > np.maximum(DEAD * np.abs(mean), np.finfo(np.float32).tiny)  # or it divides by what float32 has not
    return mean.astype(np.float32), np.where(alive, 1 / np.where(alive, std, 1), 0).astype(np.float32)


def standardised(field: Field, index: np.ndarray, stats: Statistics) -> torch.Tensor:
    """Rows `index` of an array, float32 (len(index), channel, …), standardised.

    Raises:
        StoreError: values that are no numbers, which the engine does not store.
    """
    store, name = field
    values = torch.from_numpy(store.read(name, index)).float()
    values = standardise(values, *map(torch.from_numpy, to_mean_scale(*stats)))
    if not values.sum().isfinite() and not values.isfinite().all():  # a sum is one pass, and asks for no memory
        raise StoreError(nonfinite_message(store, name))
    return values


def standardise(values: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Float32 values (sample, channel, …) by `factors`, in place."""
    shape = (-1, *[1] * (values.ndim - 2))
    return values.sub_(mean.view(shape)).mul_(scale.view(shape))


def pooled(
    stores: Sequence[FeatureStore],
    which: str,
    tokens: str,
    index: np.ndarray,
    training: np.ndarray,
    levels: Sequence[int] = (),
) -> torch.Tensor:
    """Fused pooled vectors, float32 (len(index), channel).

    Args:
        stores: of the model's members, aligned.
        which, tokens, levels: as for `vectors`.
        index: rows wanted.
        training: rows whose mean and standard deviation standardise every channel.
    """
    fields = [field for member in select_pooled(stores, which, tokens, levels) for field in member]
    return torch.cat([standardised(field, index, channel_stats(field, training)) for field in fields], dim=1)


def _chosen(names: Sequence[str], which: str, tokens: str, levels: Sequence[int] = ()) -> list[str]:
    """Names of pooled vectors: of one kind or both, all or the deepest of each kind, or those of some levels."""
    kinds = [[name for name in names if name.startswith("cls_") == cls] for cls in (False, True)]
    means, classes = kinds if kinds[1] else (kinds[0], kinds[0])
    taken = {"mean": [means], "cls": [classes], "both": [kind for kind in kinds if kind]}[tokens]
    if levels:  # the raw baseline has one vector, of no level
        taken = [_picked(kind, levels) if "_level" in kind[0] else kind for kind in taken]
    return [name for kind in taken for name in (kind[-1:] if which == "last" else kind)]


def _picked(names: Sequence[str], levels: Sequence[int]) -> list[str]:
    """Some of the levels' names, in the order of the levels, or all."""
    wrong = [level for level in levels if not -len(names) <= level < len(names)]
    if wrong:
        several = f"from 0 (finest) to {len(names) - 1}, or count from -1, the deepest"
        raise StoreError(
            f"heads.levels asks for level {wrong[0]}, and a member of this model has {len(names)}: "
            f"{', '.join(names)}. Choose {several if len(names) > 1 else '0'}."
        )
    return [names[place] for place in sorted({level % len(names) for level in levels})] if levels else list(names)
