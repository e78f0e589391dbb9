"""Minibatches of cached features on the device that trains.

They come from the disk through memory that is used again (pinned for a GPU), or, when all rows fit a budget, from
tensors kept on the device; the caller need not know which.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from cache.batches import Batches
from cache.read import Features

_STEP = 256


class Feed:
    """`cache.batches.Batches` as tensors on a device.

    Args:
        fields, rows, view: as for `Batches`.
        device: `cpu` or `cuda`.
        budget: bytes; rows that fit are read once and kept on the device.

    Attributes:
        held: they are kept there.
    """

    def __init__(
        self,
        fields: Mapping[str, Sequence[tuple[Features, str]]],
        rows: np.ndarray | None = None,
        view: str | None = None,
        device: str = "cpu",
        budget: int = 0,
    ):
        self._cuda = torch.device(device).type == "cuda"
        # On a CPU the cache's own memory is the device's.
        own = 0 if self._cuda else budget
        self._batches = Batches(fields, rows, view, own, _pinned if self._cuda else np.empty)
        self._device = device
        self.held = self._batches.held_bytes <= budget
        self._tensors = self._hold() if self.held and self._cuda else None

    def stream(self, order: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """(index, batch) for every index array of `order`; a batch lasts until the next is asked for."""
        if self._tensors is not None:
            for index in order:
                places = torch.from_numpy(self._batches.places(index)).to(self._device, non_blocking=True)
                yield index, {name: values.index_select(0, places) for name, values in self._tensors.items()}
            return
        for index, batch in self._batches.stream(order):
            tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
            if not self._cuda:
                yield index, tensors
                continue
            tensors = {name: values.to(self._device, non_blocking=True) for name, values in tensors.items()}
            copied = torch.cuda.Event()
            copied.record()
            yield index, tensors
            copied.synchronize()  # the pinned memory is about to be filled again

    def _hold(self) -> dict[str, torch.Tensor]:
        batches, tensors = self._batches, {}
        for name, shape in batches.shapes.items():
            dtype = torch.from_numpy(np.empty(0, batches.dtypes[name])).dtype
            tensors[name] = torch.empty((len(batches), *shape), dtype=dtype, device=self._device)
        order = (batches.rows[start : start + _STEP] for start in range(0, len(batches), _STEP))
        start = 0
        for index, batch in batches.stream(order):
            for name, values in batch.items():
                tensors[name][start : start + len(index)].copy_(torch.from_numpy(values))
            start += len(index)
        return tensors


def _pinned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that a GPU copies from without waiting for the processor."""
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(shape, dtype=kind, pin_memory=True).numpy()
