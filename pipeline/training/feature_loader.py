"""Features for heads: selected arrays, standardized, from memory or streamed from the disk.

The paper's composition concatenates the backbones' features along channels (arXiv 2506.20174, section 3). Each
channel is first standardized by the training split, else one backbone's scale would dominate. Levels of different
grids are combined inside the head (pipeline/heads/fusion.py), so that each is in memory on its own grid.

Larger features than a memory budget are streamed from the disk through reused memory (pinned for a GPU).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cache.arrays import VERIFY_HINT
from cache.errors import StoreError
from cache.loader import FeatureDataset
from cache.reader import FeatureStore
from cache.running_stats import RunningStats
from cache.schema import level_array, pooled_array
from pipeline.config import HeadsConfig
from pipeline.feature_ops import channels_last, standardize_

STAT_ROWS_PER_READ = 4096
# A channel whose standard deviation is below this share of its mean is a dead unit; it is set to zero.
DEAD_CHANNEL_RATIO = 1e-5

# A feature store and the name of one of its arrays.
StoreArray = tuple[FeatureStore, str]
# Mean and standard deviation of an array's channels over the training split, float64 (channel,).
ChannelStats = tuple[np.ndarray, np.ndarray]


def select_arrays(stores: Sequence[FeatureStore], heads: HeadsConfig, is_dense: bool) -> list[list[StoreArray]]:
    """Select the arrays of each backbone that a head reads: levels, finest first, or pooled features.

    A store without levels for a dense head, or without one of `heads.levels`, raises StoreError.
    """
    if not is_dense:
        return [
            [(store, pooled_array(name)) for name in _select_pooled_names(store.pooled, heads)] for store in stores
        ]
    for store in stores:
        if not store.levels:
            message = f"{store.location} has no levels, which a segmentation head needs. Extract it again."
            raise StoreError(message, key="levels", path=_local_path(store))
    return [[(store, level_array(name)) for name in _select_names(store.levels, heads.levels)] for store in stores]


def _select_pooled_names(names: Sequence[str], heads: HeadsConfig) -> list[str]:
    """Select names of pooled features by token, then by depth or levels."""
    means = [name for name in names if not name.startswith("cls_")]
    class_tokens = [name for name in names if name.startswith("cls_")]
    groups = {
        "mean": [means],
        "cls": [class_tokens or means],
        "both": [group for group in (means, class_tokens) if group],
    }[heads.linear.tokens]
    if heads.levels:  # the band statistics baseline has one vector, which belongs to no level
        groups = [_select_names(group, heads.levels) if "_level" in group[0] else group for group in groups]
    return [name for group in groups for name in (group[-1:] if heads.linear.pooled == "last" else group)]


def _select_names(names: Sequence[str], levels: Sequence[int]) -> list[str]:
    """Select the names of some levels, in order; empty `levels` for all."""
    if invalid := [level for level in levels if not -len(names) <= level < len(names)]:
        raise StoreError(
            f"heads.levels has level {invalid[0]}, but a backbone of this model has {len(names)}: {', '.join(names)}."
            " Count from 0, the finest, or from -1, the deepest.",
            key="heads.levels", value=invalid[0], allowed=range(-len(names), len(names)),
        )  # fmt: skip
    return [names[index] for index in sorted({level % len(names) for level in levels})] if levels else list(names)


def channel_stats(array: StoreArray, train_rows: np.ndarray) -> ChannelStats:
    """Compute an array's channel statistics over the training rows; StoreError if they are non-finite."""
    store, name = array
    if name in store.level_arrays:  # the writer has computed them from the same rows
        return store.statistics(store.levels[store.level_arrays.index(name)])
    parts = np.array_split(train_rows, range(STAT_ROWS_PER_READ, len(train_rows), STAT_ROWS_PER_READ))
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


def read_standardized(array: StoreArray, rows: np.ndarray, stats: ChannelStats) -> torch.Tensor:
    """Read and standardize rows of an array, float32 (row, channel, …); StoreError if non-finite."""
    store, name = array
    values = torch.from_numpy(store.read(name, rows)).float()
    values = standardize_(values, *map(torch.from_numpy, to_mean_scale(*stats)))
    if not values.sum().isfinite() and not values.isfinite().all():  # the sum needs one pass and no memory
        raise nonfinite_error(store, name)
    return values


def read_finite(store: FeatureStore, name: str, rows: np.ndarray) -> np.ndarray:
    """Read rows of an array as stored, float32; StoreError if they are non-finite."""
    values = store.read(name, rows).astype(np.float32)
    if not np.isfinite(values).all():
        raise nonfinite_error(store, name)
    return values


def nonfinite_error(store: FeatureStore, name: str) -> StoreError:
    message = f"{store.location}: {name} has non-finite values (NaN or Inf). {VERIFY_HINT}"
    return StoreError(f"{message}; if it is undamaged, extract in float32.", key=name, path=_local_path(store))


def _local_path(store: FeatureStore) -> Path | None:
    return store.location if isinstance(store.location, Path) else None


class FeatureLoader:
    """A `cache.loader.FeatureDataset`, with its arguments, as tensors on a device (`cpu` or `cuda`)."""

    def __init__(
        self, fields: Mapping[str, Sequence[StoreArray]], rows: np.ndarray | None = None,
        view: str | None = None, device: str = "cpu", budget: int = 0,
    ):  # fmt: skip
        self._device, self._is_cuda = device, torch.device(device).type == "cuda"
        self._dataset = FeatureDataset(fields, rows, view, budget, _pinned if self._is_cuda else np.empty)

    def stream(self, order: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """Yield (index, batch) for every index array of `order`; a batch is valid until the next is requested."""
        for index, batch in self._dataset.stream(order):
            tensors = {
                name: torch.from_numpy(values).to(self._device, non_blocking=True) for name, values in batch.items()
            }
            copied = torch.cuda.current_stream().record_event() if self._is_cuda else None
            yield index, tensors
            if copied:  # the next batch overwrites the pinned memory
                copied.synchronize()


def _pinned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate memory from which a GPU copies asynchronously."""
    torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(shape, dtype=torch_dtype, pin_memory=True).numpy()


class StreamedFeatures:
    """Features of a split that are streamed from the disk and standardized batch by batch.

    Pooled features are concatenated; levels are not. `stats` are each array's over the training split.
    """

    def __init__(
        self,
        arrays: Sequence[StoreArray], stats: Sequence[ChannelStats], rows: np.ndarray, device: str, is_pooled: bool,
    ):  # fmt: skip
        self._arrays, self._rows, self._is_pooled = list(arrays), rows, is_pooled
        self._loader = FeatureLoader({str(index): [array] for index, array in enumerate(arrays)}, rows, device=device)
        self._mean_scale = [
            [torch.from_numpy(values).to(device) for values in to_mean_scale(*array_stats)] for array_stats in stats
        ]
        self._rotations: Sequence[torch.Tensor] = ()

    def __len__(self) -> int:
        return len(self._rows)

    def rotate(self, rotations: Sequence[torch.Tensor]) -> "StreamedFeatures":
        rotated = copy(self)
        rotated._rotations = rotations
        return rotated

    def batches(self, order: Iterable[torch.Tensor]) -> Iterator[torch.Tensor | list[torch.Tensor]]:
        """Yield pooled features (batch, channel), or levels, for every array of positions in the split.

        After the last batch, StoreError is raised if there were non-finite values.
        """
        is_finite = [torch.tensor(True)] * len(self._arrays)  # read at the end only: reading it synchronizes a GPU
        for _, batch in self._loader.stream(self._rows[index.numpy()] for index in order):
            parts = [
                standardize_(values.to(torch.float32, copy=True), *mean_scale)
                for values, mean_scale in zip(batch.values(), self._mean_scale, strict=True)
            ]
            is_finite = [part.isfinite().all() & finite for part, finite in zip(parts, is_finite, strict=True)]
            if self._rotations:
                parts = [part @ rotation for part, rotation in zip(parts, self._rotations, strict=True)]
            yield torch.cat(parts, dim=1) if self._is_pooled else [channels_last(part) for part in parts]
        for array, finite in zip(self._arrays, is_finite, strict=True):
            if not finite:
                raise nonfinite_error(*array)


@dataclass(frozen=True)
class SplitData:
    """Features and labels of one split.

    Attributes:
        inputs: standardized pooled features (sample, channel), or levels (sample, channel, y, x), finest first; or
            either as a stream.
        label: (sample,), (sample, class) or (sample, y, x), on the device that trains.
        sample: names of the samples; may be empty.
    """

    inputs: torch.Tensor | list[torch.Tensor] | StreamedFeatures
    label: torch.Tensor
    sample: list[str] = field(default_factory=list)
