"""Principal components of the features of a store of any size."""

import math
from typing import TYPE_CHECKING

import numpy as np

from cache.errors import StoreError
from cache.reader import FeatureStore
from cache.running_stats import block_slices
from cache.schema import level_array

if TYPE_CHECKING:
    from sklearn.decomposition import IncrementalPCA

_VALUES_PER_READ = 1 << 22
# IncrementalPCA needs at least one cell per component; a few more make its first estimate stable.
_CELLS_PER_COMPONENT = 8


def principal_components(
    features: FeatureStore, level: str, n_components: int = 3, split: str = "train"
) -> "IncrementalPCA":
    """Fit a PCA to a level's feature vectors, of the first view, for RGB images or fewer channels.

    Args:
        level: name of the level, such as `level0`.
        n_components: 3 for an RGB image; at most the number of channels and of cells.
        split: of the samples to fit to.

    Returns:
        scikit-learn's transformer from (cell, channel) to (cell, component); `project` applies it to maps.
    """
    name, index = level_array(level), features.rows(split)
    shape = features.array(name).shape
    n_cells = len(index) * math.prod(shape[1:])
    if not 0 < n_components <= min(n_cells, shape[0]):
        raise StoreError(
            f"n_components is {n_components}; {shape[0]} channels in {n_cells} cells of split '{split}' allow 1 to "
            f"{min(n_cells, shape[0])}.",
            key="n_components", value=n_components,
        )  # fmt: skip
    # scikit-learn takes 1.7 s to import.
    from sklearn.decomposition import IncrementalPCA

    pca = IncrementalPCA(n_components)
    pending: list[np.ndarray] = []
    for rows in block_slices(len(index), math.prod(shape), _VALUES_PER_READ):
        pending.append(_cells(features.read(name, index[rows])))
        # The last block can be too small for a fit by itself, so one block is always kept back.
        if sum(map(len, pending)) >= _CELLS_PER_COMPONENT * n_components and len(pending) > 1:
            pca.partial_fit(np.concatenate(pending[:-1]))
            pending = pending[-1:]
    pca.partial_fit(np.concatenate(pending))
    return pca


def project(pca: "IncrementalPCA", maps: np.ndarray) -> np.ndarray:
    """Transform maps (sample, channel, y, x) to their components, float32 (sample, component, y, x)."""
    cells = pca.transform(_cells(maps)).astype(np.float32)
    n_samples, _, height, width = maps.shape
    return cells.reshape(n_samples, height, width, -1).transpose(0, 3, 1, 2)


def _cells(maps: np.ndarray) -> np.ndarray:
    return maps.astype(np.float64).transpose(0, 2, 3, 1).reshape(-1, maps.shape[1])
