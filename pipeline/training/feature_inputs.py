"""Inputs of a head: which arrays of the backbones' stores it reads, and their standardization.

The paper's composition concatenates the backbones' features along channels (arXiv 2506.20174, section 3). Each
channel is first standardized by the training split, else one backbone's scale would dominate. Levels of different
grids are combined inside the head (pipeline/heads/fusion.py), so that memory holds each on its own grid.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cache.arrays import VERIFY_HINT
from cache.errors import StoreError
from cache.reader import FeatureStore
from cache.running_stats import RunningStats
from cache.schema import level_array, pooled_array
from pipeline.feature_ops import standardize_

# A channel whose standard deviation is below this share of its mean is a dead unit; it is set to zero.
DEAD_CHANNEL_RATIO = 1e-5
ROWS_PER_READ = 4096

# A feature store and the name of one of its arrays.
StoreArray = tuple[FeatureStore, str]
# Mean and standard deviation of an array's channels over the training split, float64 (channel,).
ChannelStats = tuple[np.ndarray, np.ndarray]


def select_pooled(
    stores: Sequence[FeatureStore], depth: str, tokens: str, levels: Sequence[int] = ()
) -> list[list[StoreArray]]:
    """Select the pooled features of each backbone that a linear head reads.

    Args:
        stores: of the backbones.
        depth: `last` selects each backbone's deepest pooled features, `all` selects all of them.
        tokens: `mean`, `cls` or `both`, for backbones with class tokens; others have means only.
        levels: only of these levels, 0 the finest, -1 the deepest; empty for all.

    Raises:
        StoreError: a backbone does not have such a level.
    """
    return [
        [(store, pooled_array(name)) for name in _select_pooled_names(store.pooled, depth, tokens, levels)]
        for store in stores
    ]


def select_levels(stores: Sequence[FeatureStore], levels: Sequence[int] = ()) -> list[list[StoreArray]]:
    """Select the levels of each backbone that a dense head reads, finest first.

    Args:
        stores: of the backbones.
        levels: as for `select_pooled`.

    Raises:
        StoreError: a store has no levels, or not one of `levels`.
    """
    for store in stores:
        if not store.levels:
            message = f"{store.location} has no levels, which a segmentation head needs. Extract it again."
            raise StoreError(message, key="levels", path=_local_path(store))
    return [[(store, level_array(name)) for name in _select_names(store.levels, levels)] for store in stores]


def channel_stats(array: StoreArray, train_rows: np.ndarray) -> ChannelStats:
    """Compute an array's channel mean and standard deviation over the training rows.

    Returns:
        Both float64 (channel,).

    Raises:
        StoreError: pooled features have non-finite values.
    """
    store, name = array
    if name in store.level_arrays:  # the writer has computed them from the same rows
        return store.statistics(store.levels[store.level_arrays.index(name)])
    parts = [train_rows[start : start + ROWS_PER_READ] for start in range(0, len(train_rows), ROWS_PER_READ)]
    mean = sum(store.read(name, part).sum(axis=0, dtype=np.float64) for part in parts) / len(train_rows)
    squares = sum(((store.read(name, part).astype(np.float64) - mean) ** 2).sum(axis=0) for part in parts)
    if not np.isfinite(squares).all():
        raise nonfinite_error(store, name)
    return mean, RunningStats(len(train_rows), mean, squares).std()


def to_mean_scale(mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean to subtract and the factor to multiply by, float32 (channel,); 0 for a dead channel."""
    # float32 cannot hold the inverse of a smaller standard deviation than its smallest normal number
    is_alive = std > np.maximum(DEAD_CHANNEL_RATIO * np.abs(mean), np.finfo(np.float32).tiny)
    scale = np.where(is_alive, 1 / np.where(is_alive, std, 1), 0)
    return mean.astype(np.float32), scale.astype(np.float32)


def read_finite(store: FeatureStore, name: str, rows: np.ndarray) -> np.ndarray:
    """Read rows of an array as stored, float32 (row, channel, …).

    Raises:
        StoreError: non-finite values.
    """
    values = store.read(name, rows).astype(np.float32)
    if not np.isfinite(values).all():
        raise nonfinite_error(store, name)
    return values


def read_standardized(array: StoreArray, rows: np.ndarray, stats: ChannelStats) -> torch.Tensor:
    """Read rows of an array and standardize them, float32 (row, channel, …).

    Raises:
        StoreError: non-finite values; extraction does not store any.
    """
    store, name = array
    values = torch.from_numpy(store.read(name, rows)).float()
    values = standardize_(values, *map(torch.from_numpy, to_mean_scale(*stats)))
    if not values.sum().isfinite() and not values.isfinite().all():  # the sum needs one pass and no memory
        raise nonfinite_error(store, name)
    return values


def read_pooled(
    stores: Sequence[FeatureStore],
    depth: str,
    tokens: str,
    rows: np.ndarray,
    train_rows: np.ndarray,
    levels: Sequence[int] = (),
) -> torch.Tensor:
    """Read the concatenated pooled features of several backbones, standardized, float32 (row, channel).

    Args:
        stores: of the backbones, aligned.
        depth, tokens, levels: as for `select_pooled`.
        train_rows: rows whose mean and standard deviation standardize every channel.
    """
    arrays = [array for member in select_pooled(stores, depth, tokens, levels) for array in member]
    return torch.cat([read_standardized(array, rows, channel_stats(array, train_rows)) for array in arrays], dim=1)


def nonfinite_error(store: FeatureStore, name: str) -> StoreError:
    """Return the error for an array with non-finite values."""
    return StoreError(
        f"{store.location}: {name} has non-finite values (NaN or Inf). {VERIFY_HINT}; if it is undamaged, extract in "
        "float32.",
        key=name,
        path=_local_path(store),
    )


def _local_path(store: FeatureStore) -> Path | None:
    """Folder of a store; None for one at a remote address."""
    return store.location if isinstance(store.location, Path) else None


def _select_pooled_names(names: Sequence[str], depth: str, tokens: str, levels: Sequence[int]) -> list[str]:
    """Select names of pooled features by token, then by depth or levels."""
    means = [name for name in names if not name.startswith("cls_")]
    class_tokens = [name for name in names if name.startswith("cls_")]
    groups = {
        "mean": [means],
        "cls": [class_tokens or means],
        "both": [group for group in (means, class_tokens) if group],
    }[tokens]
    if levels:  # the band statistics baseline has one vector, which is of no level
        groups = [_select_names(group, levels) if "_level" in group[0] else group for group in groups]
    return [name for group in groups for name in (group[-1:] if depth == "last" else group)]


def _select_names(names: Sequence[str], levels: Sequence[int]) -> list[str]:
    """Select the names of some levels, in the order of the levels; empty `levels` for all."""
    if invalid := [level for level in levels if not -len(names) <= level < len(names)]:
        choice = f"from 0 (finest) to {len(names) - 1}, or count from -1, the deepest" if len(names) > 1 else "0"
        raise StoreError(
            f"heads.levels has level {invalid[0]}, but a backbone of this model has {len(names)}: "
            f"{', '.join(names)}. Choose {choice}.",
            key="heads.levels",
            value=invalid[0],
            allowed=range(-len(names), len(names)),
        )
    return [names[index] for index in sorted({level % len(names) for level in levels})] if levels else list(names)
