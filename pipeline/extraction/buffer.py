"""Memory for one shard's features: cast to the store's dtype on the device, copied back, checked.

Casting on the device halves the bytes that leave a GPU. The cast is checked with the statistics that `cache.codecs`
computes of values which the writer casts itself.
"""

from collections.abc import Mapping

import numpy as np
import torch

from cache.codecs import CastStat, check_cast
from cache.errors import StoreError
from cache.schema import StoreSchema, is_level_array
from pipeline.extraction.loader import DeviceCopies

# Values per cast. On a CPU they fit its cache. On a GPU a cast needs 20 more bytes a value.
_CPU_BLOCK_VALUES, _GPU_BLOCK_VALUES = 2**18, 2**25
# Values too small for the dtype are counted in one of so many samples.
_SUBNORMAL_SAMPLE_STEP = 8
# Columns of the statistics of a cast: those of `CastStat`, then the number of NaN and infinite values.
_N_NONFINITE = len(CastStat)


class ShardBuffer:
    """Memory of one shard of every array, reused for later shards; several threads may put rows into it.

    Args:
        schema: the store's.
        download: copies features from the device.
    """

    def __init__(self, schema: StoreSchema, download: DeviceCopies):
        self._schema, self._download = schema, download
        self._arrays: dict[str, torch.Tensor] = {}
        self._stats: dict[str, torch.Tensor] = {}

    def put(self, rows: slice, name: str, values: torch.Tensor) -> None:
        """Start to copy features into rows of the shard.

        Args:
            rows: rows within the shard.
            name: path of the array in the store.
            values: (sample, …), or (sample, view, …) for a store with views.
        """
        block_values = _GPU_BLOCK_VALUES if values.is_cuda else _CPU_BLOCK_VALUES
        step = max(1, block_values // max(1, values[:1].numel()))
        for first in range(0, len(values), step):
            block = values[first : first + step]
            start = rows.start + first
            self._put_block(slice(start, start + len(block)), name, block, first)

    def _put_block(self, rows: slice, name: str, values: torch.Tensor, first: int) -> None:
        if values.is_cuda and not is_level_array(name):
            # Pooled vectors are few bytes, and casting launches dozens of kernels: the writer casts them.
            self._copy(self._arrays, name, rows, values.float())
            return
        if self._is_cast_here(name):
            values, stats = cast_with_stats(values, getattr(torch, self._schema.dtype), first)
        else:
            values, stats = values.float(), count_nonfinite(values)
        self._copy(self._stats, name, rows, stats)
        self._copy(self._arrays, name, rows, values)

    def collect(self, n_rows: int) -> tuple[dict[str, np.ndarray], dict[str, tuple[float, float]]]:
        """Return the first rows of every array, and the errors of the casts, as `Writer.write` takes them.

        Raises:
            StoreError: NaN or infinite values, or values that the store's dtype cannot represent.
        """
        arrays = {name: array[:n_rows].numpy() for name, array in self._arrays.items()}
        stats = {name: array_stats[:n_rows].numpy() for name, array_stats in self._stats.items()}
        for name, array in arrays.items():
            _check_finite(name, array, stats)
        cast_errors = {
            name: check_cast(array_stats[:, : len(CastStat)], name, self._schema.dtype)
            for name, array_stats in stats.items()
            if self._is_cast_here(name)
        }
        return arrays, cast_errors

    def _is_cast_here(self, name: str) -> bool:
        # For a lossy codec the writer casts, and measures the error of cast and codec together from float32.
        has_lossy_codec = self._schema.codec.is_lossy and is_level_array(name)
        return self._schema.dtype != "float32" and not has_lossy_codec

    def _copy(self, memory: dict[str, torch.Tensor], name: str, rows: slice, values: torch.Tensor) -> None:
        if name not in memory:
            n_rows = min(self._schema.shard_size, len(self._schema.sample))
            # If two threads allocate concurrently, the memory of the first is used.
            memory.setdefault(name, self._download.empty((n_rows, *values.shape[1:]), values.dtype))
        self._download.copy(memory[name][rows], values)


def _check_finite(name: str, array: np.ndarray, stats: Mapping[str, np.ndarray]) -> None:
    counts = stats[name][:, _N_NONFINITE] if name in stats else ~np.isfinite(array)
    if n_nonfinite := int(counts.sum()):
        raise StoreError(
            f"{n_nonfinite} values of {name} are NaN or infinite. Check the images; if extract.precision is float16, "
            "set it to bfloat16 or float32.",
            key=name,
            value=n_nonfinite,
        )


def cast_with_stats(values: torch.Tensor, dtype: torch.dtype, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast features and measure the effect on each sample, without waiting for a GPU.

    Args:
        values: (sample, channel, …).
        first: number of the first sample in its batch.

    Returns:
        The values in `dtype`, and float64 (sample, 7): the columns of `CastStat`, then the number of non-finite
        values.
    """
    low = values.to(dtype)
    channels_last = not values.is_contiguous()  # for both: the memory format of `low` may differ
    original = _flatten_samples(values, channels_last).float()
    difference = _flatten_samples(low, channels_last).to(torch.float32, copy=True).sub_(original)
    size, error = (torch.linalg.vector_norm(part, dim=1) for part in (original, difference))
    stats = torch.zeros(len(values), len(CastStat) + 1, dtype=torch.float64, device=values.device)
    # On a CPU the check of the norms is cheap and saves the passes below. On a GPU it would wait.
    if values.is_cuda or not bool(torch.isfinite(size + error).all()):
        is_finite = original.isfinite()
        is_too_large = difference.isinf() & is_finite
        stats[:, CastStat.N_TOO_LARGE] = is_too_large.sum(dim=1)
        stats[:, CastStat.MAX_TOO_LARGE] = torch.where(is_too_large, original, 0).abs().amax(dim=1)
        stats[:, _N_NONFINITE] = (~is_finite).sum(dim=1)
        size, error = (
            torch.linalg.vector_norm(torch.where(is_finite & ~is_too_large, part, 0), dim=1, dtype=torch.float64)
            for part in (original, difference)
        )
    sampled = slice(-first % _SUBNORMAL_SAMPLE_STEP, None, _SUBNORMAL_SAMPLE_STEP)
    if len(magnitude := original[sampled].abs()):
        n_zeros = (magnitude == 0).sum(dim=1)
        n_tiny = (magnitude < torch.finfo(dtype).tiny).sum(dim=1)
        stats[sampled, CastStat.N_SUBNORMAL] = (n_tiny - n_zeros).double()
        stats[sampled, CastStat.N_NONZERO] = (magnitude.shape[1] - n_zeros).double()
    stats[:, CastStat.SQUARED_ERROR] = error.double().square()
    stats[:, CastStat.SUM_OF_SQUARES] = size.double().square()
    return low, stats


def count_nonfinite(values: torch.Tensor) -> torch.Tensor:
    """Count the non-finite values of each sample; the other columns of `cast_with_stats` are zero."""
    stats = torch.zeros(len(values), len(CastStat) + 1, dtype=torch.float64, device=values.device)
    stats[:, _N_NONFINITE] = (~values.isfinite()).flatten(1).sum(dim=1)
    return stats


def _flatten_samples(values: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Return (sample, values) in the order of memory, so that nothing is copied."""
    return (values.movedim(1, -1) if channels_last else values).flatten(1)
