"""Statistics over a finished store of any size: channel moments by dask, principal components by scikit-learn."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import dask
import numpy as np

from cache import running_stats
from cache.errors import StoreError
from cache.reader import FeatureStore

if TYPE_CHECKING:
    from sklearn.decomposition import IncrementalPCA

# Values that a task reads at once.
_BLOCK = 1 << 22


def channel_statistics(
    features: FeatureStore, level: str, split: str = "train", view: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of a level's channels over a split, float64 (channel,).

    One dask task a block of samples, merged in their order, so that the same store gives the same bits. Values
    that are NaN or infinite make their channel's statistics so.

    Args:
        features: the store; never more than a block for each core of it is in memory.
        level: such as `level0`.
        view: None for every view of a sample.
    """
    views = [view] if view or not features.view else features.view
    parts = [
        dask.delayed(_moments)(features, f"{level}/features", index, one)
        for index in _blocks(features, level, split)
        for one in views
    ]
    whole = running_stats.merge(dask.compute(*parts, scheduler="threads"))
    return whole.mean, whole.std()


def principal_components(
    features: FeatureStore, level: str, n_components: int = 3, split: str = "train"
) -> "IncrementalPCA":
    """PCA of a level's cells over a split, for pictures and for reduced features.

    Args:
        components: 3 make a picture.

    In a store with views, those of the first.

    Returns:
        scikit-learn's fitted transformer from (cell, channel) to (cell, components); `project` applies it to maps.

    Raises:
        StoreError: more components than channels or cells.
    """
    cells = len(features.rows(split)) * int(np.prod(features.array(f"{level}/features").shape[1:]))
    channels = features.array(f"{level}/features").shape[0]
    if not 0 < n_components <= min(cells, channels):
        raise StoreError(
            f"{n_components} components were asked for of {channels} channels in {cells} cells of split '{split}'; "
            "there can be as many as the fewer of them."
        )
    # As slow to import as torch, and whoever writes a store imports this file.
    from sklearn.decomposition import IncrementalPCA

    pca = IncrementalPCA(n_components)
    waiting: list[np.ndarray] = []
    for index in _blocks(features, level, split):
        waiting.append(_cells(features.read(f"{level}/features", index)))
        # partial_fit wants at least as many cells as components; a small last block joins the one before it.
        if sum(map(len, waiting)) >= 8 * n_components and len(waiting) > 1:
            pca.partial_fit(np.concatenate(waiting[:-1]))
            waiting = waiting[-1:]
    pca.partial_fit(np.concatenate(waiting))
    return pca


def project(pca: "IncrementalPCA", maps: np.ndarray) -> np.ndarray:
    """Maps (sample, channel, y, x) as their principal components, float32 (sample, component, y, x)."""
    cells = pca.transform(_cells(maps)).astype(np.float32)
    sample, _, height, width = maps.shape
    return cells.reshape(sample, height, width, -1).transpose(0, 3, 1, 2)


def _cells(maps: np.ndarray) -> np.ndarray:
    return maps.astype(np.float64).transpose(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _blocks(features: FeatureStore, level: str, split: str) -> Iterator[np.ndarray]:
    index = features.rows(split)
    step = max(1, _BLOCK // int(np.prod(features.array(f"{level}/features").shape)))
    for start in range(0, len(index), step):
        yield index[start : start + step]


def _moments(features: FeatureStore, name: str, index: np.ndarray, view: str | None) -> running_stats.RunningStats:
    return running_stats.from_array(features.read(name, index, view))
