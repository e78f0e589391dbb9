"""Memory for one shard's features: cast to the store's dtype on the device, copied back, checked.

Casting on the device halves the bytes that leave a GPU.
"""

import numpy as np
import torch

from cache.codecs import CastStats, measure_cast
from cache.errors import StoreError
from cache.schema import StoreSchema, is_level_array
from pipeline.extraction.loader import DeviceCopies

# Values per cast. On a CPU they fit its cache. On a GPU a cast needs 20 more bytes a value.
_CPU_BLOCK_VALUES, _GPU_BLOCK_VALUES = 2**18, 2**25


class ShardBuffer:
    """Memory of one shard of every array, reused for later shards; several threads may put rows into it."""

    def __init__(self, schema: StoreSchema, download: DeviceCopies):
        self._schema, self._download = schema, download
        self._arrays: dict[str, torch.Tensor] = {}
        self._stats: dict[str, torch.Tensor] = {}

    def put(self, rows: slice, name: str, values: torch.Tensor) -> None:
        """Start to copy features of an array, (sample, …) or (sample, view, …), into rows of the shard."""
        if values.is_cuda and not is_level_array(name):
            # Pooled vectors are few bytes, and a cast launches dozens of kernels: `collect` casts them.
            self._copy(self._arrays, name, rows, values.float())
            return
        block_values = _GPU_BLOCK_VALUES if values.is_cuda else _CPU_BLOCK_VALUES
        step = max(1, block_values // max(1, values[:1].numel()))
        for first in range(0, len(values), step):
            low, stats = cast_with_stats(values[first : first + step], self._dtype(name))
            start = rows.start + first
            self._copy(self._arrays, name, slice(start, start + len(low)), low)
            self._copy(self._stats, name, slice(start, start + len(low)), stats)

    def collect(self, n_rows: int) -> tuple[dict[str, np.ndarray], dict[str, CastStats]]:
        """Return the first rows of every array and their cast statistics; StoreError for NaN or infinity."""
        arrays, stats = {}, {}
        for name, memory in self._arrays.items():
            array, array_stats = memory[:n_rows], self._stats.get(name)
            if array_stats is None:
                array, array_stats = cast_with_stats(array, self._dtype(name))
            arrays[name], stats[name] = array.numpy(), CastStats(*array_stats[:n_rows].numpy().T)
            if n_nonfinite := int(stats[name].n_nonfinite.sum()):
                raise StoreError(
                    f"{n_nonfinite} values of {name} are NaN or infinite. Check the images; if extract.precision is "
                    "float16, set it to bfloat16 or float32.",
                    key=name, value=n_nonfinite,
                )  # fmt: skip
        return arrays, stats

    def _dtype(self, name: str) -> torch.dtype:
        # For a lossy codec the writer casts, and measures the error of cast and codec together from float32.
        is_lossy = self._schema.codec.has_scale and is_level_array(name)
        return torch.float32 if is_lossy else getattr(torch, self._schema.dtype)

    def _copy(self, memory: dict[str, torch.Tensor], name: str, rows: slice, values: torch.Tensor) -> None:
        if name not in memory:
            n_rows = min(self._schema.shard_size, len(self._schema.sample))
            # If two threads allocate concurrently, the memory of the first is used.
            memory.setdefault(name, self._download.empty((n_rows, *values.shape[1:]), values.dtype))
        self._download.copy(memory[name][rows], values)


def cast_with_stats(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast features (sample, channel, …), and measure the effect on each sample.

    The second tensor has the fields of `CastStats`, float64 (sample, field): one copy for all.
    """
    low = values.to(dtype)
    # In the order of memory, so that nothing is copied.
    in_order = (values, low) if values.is_contiguous() else (values.movedim(1, -1), low.movedim(1, -1))
    original, result = (part.flatten(1).float() for part in in_order)
    stats = measure_cast(original, result, str(dtype).removeprefix("torch."), torch)
    return low, torch.stack([field.double() for field in stats], dim=1)
