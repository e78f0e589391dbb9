"""Minibatches of cached features on the device that trains.

Features that fit a memory budget are read once and stay on the device. Others are streamed from the disk through
reused memory (pinned for a GPU). The caller need not know which.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field

import numpy as np
import torch

from cache.loader import FeatureDataset
from pipeline.feature_ops import channels_last, standardize_
from pipeline.training.feature_inputs import ChannelStats, StoreArray, nonfinite_error, to_mean_scale

ROWS_PER_READ = 256


class FeatureLoader:
    """A `cache.loader.FeatureDataset` as tensors on a device.

    Args:
        fields, rows, view: as for `FeatureDataset`.
        device: `cpu` or `cuda`.
        budget: bytes; rows that fit are read once and stay on the device.

    Attributes:
        in_memory: whether they stay there.
    """

    def __init__(
        self,
        fields: Mapping[str, Sequence[StoreArray]],
        rows: np.ndarray | None = None,
        view: str | None = None,
        device: str = "cpu",
        budget: int = 0,
    ):
        self._is_cuda = torch.device(device).type == "cuda"
        self._dataset = FeatureDataset(fields, rows, view, empty=_pinned if self._is_cuda else np.empty)
        self._device = device
        self._tensors = self._read_all() if self._dataset.total_bytes <= budget else None

    @property
    def in_memory(self) -> bool:
        return self._tensors is not None

    def stream(self, order: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """Yield (index, batch) for every index array of `order`; a batch is valid until the next is requested."""
        return self._from_disk(order) if self._tensors is None else self._from_device(order)

    def _from_disk(self, order: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        for index, batch in self._dataset.stream(order):
            tensors = {
                name: torch.from_numpy(values).to(self._device, non_blocking=True) for name, values in batch.items()
            }
            copied = torch.cuda.current_stream().record_event() if self._is_cuda else None
            yield index, tensors
            if copied:  # the next batch overwrites the pinned memory
                copied.synchronize()

    def _from_device(self, order: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        out = {}
        for index in order:
            positions = torch.from_numpy(self._dataset.positions(index)).to(self._device)
            for name, values in self._tensors.items():
                if name not in out or len(out[name]) < len(index):
                    out[name] = values.new_empty((len(index), *values.shape[1:]))
                torch.index_select(values, 0, positions, out=out[name][: len(index)])
            yield index, {name: values[: len(index)] for name, values in out.items()}

    def _read_all(self) -> dict[str, torch.Tensor]:
        dataset, tensors, start = self._dataset, {}, 0
        order = (dataset.rows[first : first + ROWS_PER_READ] for first in range(0, len(dataset), ROWS_PER_READ))
        for index, batch in self._from_disk(order):
            for name, values in batch.items():
                if name not in tensors:
                    tensors[name] = values.new_empty((len(dataset), *values.shape[1:]))
                tensors[name][start : start + len(index)] = values
            start += len(index)
        return tensors


class StreamedFeatures:
    """Features of a split that are streamed from the disk and standardized batch by batch.

    Args:
        arrays: arrays of aligned stores.
        stats: mean and standard deviation of each array.
        rows: rows of the split.
        device: where batches are moved.
        is_pooled: whether the arrays are pooled features, which are concatenated; else they are levels.

    Attributes:
        shapes: of one sample of each array.
    """

    def __init__(
        self,
        arrays: Sequence[StoreArray],
        stats: Sequence[ChannelStats],
        rows: np.ndarray,
        device: str,
        is_pooled: bool,
    ):
        fields = {f"{index:03d}": [array] for index, array in enumerate(arrays)}
        self._loader, self._rows, self._is_pooled = FeatureLoader(fields, rows, device=device), rows, is_pooled
        self._mean_scale = [
            [torch.from_numpy(values).to(device) for values in to_mean_scale(*array_stats)] for array_stats in stats
        ]
        self._arrays = list(arrays)
        self.shapes = [tuple(store.array(name).shape) for store, name in arrays]
        self._rotations: Sequence[torch.Tensor] = ()

    def __len__(self) -> int:
        return len(self._rows)

    def rotate(self, rotations: Sequence[torch.Tensor]) -> "StreamedFeatures":
        """Return the same features, each array rotated by its matrix (channel, axis)."""
        rotated = copy(self)
        rotated._rotations = rotations
        return rotated

    def batches(self, order: Iterable[torch.Tensor]) -> Iterator[torch.Tensor | list[torch.Tensor]]:
        """Yield a batch for every array of positions in the split.

        Returns:
            Pooled features (batch, channel), or levels (batch, channel, y, x).

        Raises:
            StoreError: after the last batch, if there were non-finite values.
        """
        is_finite: dict[int, torch.Tensor] = {}  # read at the end only: reading it synchronizes a GPU
        for _, batch in self._loader.stream(self._rows[index.numpy()] for index in order):
            parts = [
                standardize_(batch[name].to(torch.float32, copy=True), *self._mean_scale[index])
                for index, name in enumerate(sorted(batch))
            ]
            for index, part in enumerate(parts):
                is_finite[index] = part.isfinite().all() & is_finite.get(index, True)
            if self._rotations:
                parts = [part @ rotation for part, rotation in zip(parts, self._rotations, strict=True)]
            yield torch.cat(parts, dim=1) if self._is_pooled else [channels_last(part) for part in parts]
        for index, finite in is_finite.items():
            if not finite:
                raise nonfinite_error(*self._arrays[index])


@dataclass(frozen=True)
class SplitData:
    """Features and labels of one split.

    Attributes:
        inputs: standardized pooled features (sample, channel), or a list of levels (sample, channel, y, x), finest
            first; or either as a stream.
        label: (sample,), (sample, class) or (sample, y, x), on the device that trains.
        sample: names of the samples; may be empty where nobody needs them.
    """

    inputs: torch.Tensor | list[torch.Tensor] | StreamedFeatures
    label: torch.Tensor
    sample: list[str] = field(default_factory=list)


def _pinned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate memory from which a GPU copies asynchronously."""
    torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(shape, dtype=torch_dtype, pin_memory=True).numpy()
