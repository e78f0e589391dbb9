"""One shard's features on their way from the device to the store."""

import numpy as np
import torch

from cache.casting import check_cast
from cache.errors import StoreError
from cache.schema import StoreSchema
from pipeline.extraction.narrow import cast_with_stats, count_nonfinite
from pipeline.extraction.transfer import DeviceToHost

# Values that are narrowed at once: on a processor what its cache keeps; on a GPU, where each takes some 20 bytes,
# what fits beside a network that may fill it.
_BLOCK, _GPU_BLOCK = 2**18, 2**25


class ShardBuffer:
    """Memory of one shard of every array, used again and again; several threads may put rows into it.

    Args:
        layout: the store's.
        download: how features come back from the device.
    """

    def __init__(self, layout: StoreSchema, download: DeviceToHost):
        self._layout, self._download = layout, download
        self._arrays: dict[str, torch.Tensor] = {}
        self._tallies: dict[str, torch.Tensor] = {}

    def put(self, rows: slice, name: str, values: torch.Tensor) -> None:
        """Begin to bring features (sample, …) or (sample, view, …) into rows of the shard."""
        step = max(1, (_GPU_BLOCK if values.is_cuda else _BLOCK) // max(1, values[:1].numel()))
        for first in range(0, len(values), step):
            some = values[first : first + step]
            start = rows.start + first
            self._put(slice(start, start + len(some)), name, some, first)

    def _put(self, rows: slice, name: str, values: torch.Tensor, first: int) -> None:
        if values.is_cuda and not name.endswith("/features"):
            # Vectors are few bytes, and narrowing is dozens of kernels an array: the writer does it.
            self._copy(self._arrays, name, rows, values.float())
            return
        if self._narrows(name):
            values, tally = cast_with_stats(values, getattr(torch, self._layout.dtype), first)
        else:
            values, tally = values.float(), count_nonfinite(values)
        self._copy(self._tallies, name, rows, tally)
        self._copy(self._arrays, name, rows, values)

    def take(self, length: int) -> tuple[dict[str, np.ndarray], dict[str, tuple[float, float]]]:
        """The first rows of every array, and what `Writer.write` wants to know of those that were narrowed.

        Raises:
            StoreError: values that the store's dtype cannot hold, or that are no finite numbers.
        """
        arrays = {name: array[:length].numpy() for name, array in self._arrays.items()}
        tallies = {name: tally[:length].numpy() for name, tally in self._tallies.items()}
        for name, array in arrays.items():
            untold = name not in tallies
            if count := int((~np.isfinite(array)).sum() if untold else tallies[name][:, 6].sum()):
                raise StoreError(
                    f"{count} values of {name} are NaN or infinite. Check the images; if extract.precision is "
                    "float16, set it to bfloat16 or float32."
                )
        lost = {
            name: check_cast(tally[:, :6], name, self._layout.dtype)
            for name, tally in tallies.items()
            if self._narrows(name)
        }
        return arrays, lost

    def _narrows(self, name: str) -> bool:
        # A codec that loses digits of its own measures both losses together, from float32.
        lossy = self._layout.codec.is_lossy and name.endswith("/features")
        return self._layout.dtype != "float32" and not lossy

    def _copy(self, held: dict, name: str, rows: slice, values: torch.Tensor) -> None:
        if name not in held:
            count = min(self._layout.shard_size, len(self._layout.sample))
            # Of two threads that find nothing, the first decides.
            held.setdefault(name, self._download.empty((count, *values.shape[1:]), values.dtype))
        self._download.copy(held[name][rows], values)
