"""Mean and spread of a level's channels, summed piece by piece and merged, exact to float64's last digits."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# Values in a piece: few enough that, as float64, they stay in a processor's cache from one step to the next.
_BLOCK_VALUES = 2**17


@dataclass(frozen=True)
class RunningStats:
    """Of any part of a level.

    Attributes:
        count: values a channel.
        mean: of each, float64 (channel,).
        squares: sum of squares about the mean, float64 (channel,).
    """

    count: int
    mean: np.ndarray
    squared_deviations: np.ndarray

    def to_json(self) -> list:
        """As JSON; `Moments.read` gives the same bits back."""
        return [self.count, self.mean.tolist(), self.squared_deviations.tolist()]

    @classmethod
    def from_json(cls, record: list) -> "RunningStats":
        count, *arrays = record
        return cls(count, *map(np.array, arrays))

    def std(self) -> np.ndarray:
        return np.sqrt(self.squared_deviations / self.count)


def block_slices(count: int, size: int, values: int = _BLOCK_VALUES) -> list[slice]:
    """Rows of `count` maps with `size` values each, cut into pieces of about so many values."""
    step = max(1, values // size)
    return [slice(start, start + step) for start in range(0, count, step)]


def from_array(maps: np.ndarray) -> RunningStats | None:
    """Moments of maps (map, channel, y, x); None of none.

    Values that are NaN or infinite make their channel's moments so.
    """
    flat = maps.reshape(*maps.shape[:2], math.prod(maps.shape[2:]))
    cut = block_slices(len(flat), math.prod(flat.shape[1:]))
    memory = np.empty(flat[cut[0]].shape) if cut else None  # fresh memory costs more than the sums
    return merge(_of(part, memory[: len(part)]) for part in map(flat.__getitem__, cut))


def merge(parts: Iterable[RunningStats]) -> RunningStats | None:
    """Moments of all parts together, in their order, so that the same parts give the same bits; None of none.

    Source: Chan, Golub, LeVeque 1983, doi:10.1080/00031305.1983.10483115.
    """
    whole = None
    for part in parts:
        whole = part if whole is None else _two(whole, part)
    return whole


def _two(one: RunningStats, other: RunningStats) -> RunningStats:
    count = one.count + other.count
    away = other.mean - one.mean
    mean = one.mean + away * (other.count / count)
    squares = one.squared_deviations + other.squared_deviations + away**2 * (one.count * other.count / count)
    return RunningStats(count, mean, squares)


def _of(maps: np.ndarray, away: np.ndarray) -> RunningStats:
    """Of a few maps (map, channel, cell); `away` is memory of their shape, float64."""
    # About a value of each channel's own: one whose spread is small beside its mean would lose it otherwise.
    about, count = maps[0, :, 0].astype(np.float64), len(maps) * maps.shape[2]
    with np.errstate(invalid="ignore"):  # infinities among them
        np.subtract(maps, about[:, None], out=away)
        total = _sums(away)
        squares = _sums(np.square(away, out=away)) - total * total / count
    return RunningStats(count, about + total / count, np.maximum(squares, 0))


def _sums(values: np.ndarray) -> np.ndarray:
    """Sums of each channel of (map, channel, cell); not by BLAS, whose last digits depend on its threads."""
    # Map upon map first: maps may be so small that a sum over each is slow.
    return (values[0] if len(values) == 1 else values.sum(axis=0)).sum(axis=1)
