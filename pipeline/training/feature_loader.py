"""Minibatches of cached features on the device that trains.

They come from the disk through memory that is used again (pinned for a GPU), or, when all rows fit a budget, from
tensors kept on the device; the caller need not know which.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch

from cache.errors import StoreError
from cache.loader import FeatureDataset
from cache.reader import FeatureStore
from pipeline.training.feature_inputs import Field, Statistics, to_mean_scale, nonfinite_message, standardise

_STEP = 256


class FeatureLoader:
    """`cache.loader.Batches` as tensors on a device.

    Args:
        fields, rows, view: as for `Batches`.
        device: `cpu` or `cuda`.
        budget: bytes; rows that fit are read once and kept on the device.

    Attributes:
        held: they are kept there.
    """

    def __init__(
        self,
        fields: Mapping[str, Sequence[tuple[FeatureStore, str]]],
        rows: np.ndarray | None = None,
        view: str | None = None,
        device: str = "cpu",
        budget: int = 0,
    ):
        self._cuda = torch.device(device).type == "cuda"
        self._batches = FeatureDataset(fields, rows, view, empty=_pinned if self._cuda else np.empty)
        self._device = device
        self._tensors = self._hold() if self._batches.total_bytes <= budget else None

    @property
    def held(self) -> bool:
        return self._tensors is not None

    def stream(self, order: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """(index, batch) for every index array of `order`; a batch lasts until the next is asked for."""
        return self._from_disk(order) if self._tensors is None else self._from_device(order)

    def _from_disk(self, order):
        for index, batch in self._batches.stream(order):
            moved = {
                name: torch.from_numpy(values).to(self._device, non_blocking=True) for name, values in batch.items()
            }
            copied = torch.cuda.current_stream().record_event() if self._cuda else None
            yield index, moved
            if copied:  # the pinned memory is about to be filled again
                copied.synchronize()

    def _from_device(self, order):
        out = {}
        for index in order:
            places = torch.from_numpy(self._batches.positions(index)).to(self._device)
            for name, values in self._tensors.items():
                if name not in out or len(out[name]) < len(index):
                    out[name] = values.new_empty((len(index), *values.shape[1:]))
                torch.index_select(values, 0, places, out=out[name][: len(index)])
            yield index, {name: values[: len(index)] for name, values in out.items()}

    def _hold(self) -> dict[str, torch.Tensor]:
        batches, tensors, start = self._batches, {}, 0
        order = (batches.rows[first : first + _STEP] for first in range(0, len(batches), _STEP))
        for index, batch in self._from_disk(order):
            for name, values in batch.items():
                if name not in tensors:
                    tensors[name] = values.new_empty((len(batches), *values.shape[1:]))
                tensors[name][start : start + len(index)] = values
            start += len(index)
        return tensors


class StreamedFeatures:
    """A split's features, standardised batch by batch as they come from the disk.

    Args:
        fields: arrays of aligned stores.
        by: the mean and standard deviation of each.
        rows: the split's rows.
        device: where batches go.
        vectors: the fields are pooled vectors, to be given side by side.
    """

    def __init__(
        self, fields: Sequence[Field], by: Sequence[Statistics], rows: np.ndarray, device: str, vectors: bool
    ):
        named = {f"{place:03d}": [field] for place, field in enumerate(fields)}
        self._feed, self._rows, self._vectors = FeatureLoader(named, rows, device=device), rows, vectors
        self._by = [[torch.from_numpy(one).to(device) for one in to_mean_scale(*each)] for each in by]
        self._fields = list(fields)
        self.shapes = [tuple(store.array(name).shape) for store, name in fields]
        self._axes: Sequence[torch.Tensor] = ()

    def __len__(self) -> int:
        return len(self._rows)

    def turned(self, axes: Sequence[torch.Tensor]) -> "StreamedFeatures":
        """The same with each pooled vector in axes of its own, (channel, axis)."""
        other = copy(self)
        other._axes = axes
        return other

    def batches(self, order: Iterable[torch.Tensor]) -> Iterator[torch.Tensor | list[torch.Tensor]]:
        """For every array of positions in the split: (batch, channel), or a list of maps (batch, channel, y, x).

        Raises:
            StoreError: when all are given: some had values that are no numbers.
        """
        sound: dict[int, torch.Tensor] = {}  # asked only then, since a GPU would have to be waited for
        for _, batch in self._feed.stream(self._rows[index.numpy()] for index in order):
            parts = [
                standardise(batch[name].to(torch.float32, copy=True), *self._by[place])
                for place, name in enumerate(sorted(batch))
            ]
            for place, part in enumerate(parts):
                sound[place] = part.isfinite().all() & sound.get(place, True)
            if self._axes:
                parts = [part @ axes for part, axes in zip(parts, self._axes, strict=True)]
            yield torch.cat(parts, dim=1) if self._vectors else [channels_last(part) for part in parts]
        for place, whole in sound.items():
            if not whole:
                raise StoreError(nonfinite_message(*self._fields[place]))


@dataclass(frozen=True)
class Data:
    """Features and labels of the same samples.

    Attributes:
        inputs: (sample, channel), or a list of levels (sample, channel, y, x), standardised; or a stream of them.
        label: (sample,), (sample, class) or (sample, y, x), on the device that trains.
    """

    inputs: torch.Tensor | list[torch.Tensor] | StreamedFeatures
    label: torch.Tensor


def channels_last(maps: torch.Tensor) -> torch.Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def _pinned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that a GPU copies from without waiting for the processor."""
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(shape, dtype=kind, pin_memory=True).numpy()
