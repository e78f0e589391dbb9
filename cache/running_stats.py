"""Mean and standard deviation per channel, computed block by block in float64 and merged."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np

# Values of a block: few enough to stay, as float64, in the cache of a core between the steps.
_BLOCK_VALUES = 2**17


@dataclass(frozen=True)
class RunningStats:
    """Statistics of any part of an array, per channel.

    `count` is of values per channel; `mean` and the sums of squared differences to it are float64 (channel,).
    """

    count: int
    mean: np.ndarray
    squared_deviations: np.ndarray

    @classmethod
    def from_array(cls, maps: np.ndarray) -> "RunningStats | None":
        """Compute the statistics of maps (map, channel, y, x); None if there are no maps.

        A channel with NaN or infinite values gets a non-finite mean and standard deviation.
        """
        flat = maps.reshape(*maps.shape[:2], math.prod(maps.shape[2:]))
        blocks = block_slices(len(flat), math.prod(flat.shape[1:]))
        # One buffer for all blocks: allocating one each time takes longer than the sums.
        buffer = np.empty(flat[blocks[0]].shape) if blocks else None
        return cls.merge(_block_stats(block, buffer[: len(block)]) for block in map(flat.__getitem__, blocks))

    @staticmethod
    def merge(parts: Iterable["RunningStats"]) -> "RunningStats | None":
        """Merge the statistics of several parts, None if there are none; the same order gives the same bits.

        Source: Chan, Golub, LeVeque 1983, doi:10.1080/00031305.1983.10483115.
        """
        return reduce(_merge_two, parts) if (parts := list(parts)) else None

    def std(self) -> np.ndarray:
        """Return the standard deviation (population, not sample), float64 (channel,)."""
        return np.sqrt(self.squared_deviations / self.count)

    def to_json(self) -> list:
        """Return JSON values from which `from_json` restores the same bits."""
        return [self.count, self.mean.tolist(), self.squared_deviations.tolist()]

    @classmethod
    def from_json(cls, values: list) -> "RunningStats":
        """Restore the statistics that `to_json` returned."""
        count, *arrays = values
        return cls(count, *map(np.array, arrays))


def mean_std_from_sums(count: int, total: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation per channel from a count and float64 sums of values and squares.

    Only for values whose mean is not large compared with their spread, such as pixels: the difference of two large
    numbers would lose digits. `RunningStats` has no such limit.
    """
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def block_slices(count: int, values_per_row: int, block_values: int = _BLOCK_VALUES) -> list[slice]:
    """Split `count` rows into slices of about `block_values` values each."""
    step = max(1, block_values // values_per_row)
    return [slice(start, start + step) for start in range(0, count, step)]


def _merge_two(a: RunningStats, b: RunningStats) -> RunningStats:
    count = a.count + b.count
    difference = b.mean - a.mean
    mean = a.mean + difference * (b.count / count)
    squared_deviations = a.squared_deviations + b.squared_deviations + difference**2 * (a.count * b.count / count)
    return RunningStats(count, mean, squared_deviations)


def _block_stats(maps: np.ndarray, deviation: np.ndarray) -> RunningStats:
    """Statistics of a few maps (map, channel, cell); `deviation` is a float64 buffer of their shape."""
    # Shifted by one value of each channel: a spread that is small compared with the mean would be lost otherwise.
    shift, count = maps[0, :, 0].astype(np.float64), len(maps) * maps.shape[2]
    with np.errstate(invalid="ignore"):  # infinite values
        np.subtract(maps, shift[:, None], out=deviation)
        total = _channel_sums(deviation)
        squares = _channel_sums(np.square(deviation, out=deviation)) - total * total / count
    return RunningStats(count, shift + total / count, np.maximum(squares, 0))


def _channel_sums(values: np.ndarray) -> np.ndarray:
    """Sum (map, channel, cell) per channel, not by BLAS, whose rounding depends on its threads."""
    # The maps first: maps can be so small that a sum over each is slow.
    return (values[0] if len(values) == 1 else values.sum(axis=0)).sum(axis=1)
