"""The means of a set's bands against the published ones: a copy whose bands are in another order is noticed."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.errors import UserError

# By how many standard deviations a mean may differ from the published one: those of other draws of pixels differ by
# less.
_TOLERANCE = 0.2
_TRUST = "If you know better, set check_means: false in the set's options."


@dataclass(frozen=True)
class BandMeanCheck:
    """Compares the means of all bands with published ones.

    Attributes:
        published: mean and standard deviation by key; None where there is none.
        told: of two bands whose published means differ by more standard deviations an exchange is noticed.
    """

    name: str
    published: Mapping[str, tuple[float, float] | None]
    min_separation: float

    def __call__(self, mean: np.ndarray) -> None:
        known = [(key, value, *pair) for value, (key, pair) in zip(mean, self.published.items(), strict=True) if pair]
        for key, value, wanted, std in known:
            if abs(value - wanted) > _TOLERANCE * std:
                raise UserError(
                    f"{self.name}: the mean of '{key}' is {value:.6g}, and {wanted:.6g} (standard deviation "
                    f"{std:.6g}) is published: these are not the released files, or their bands are in another "
                    f"order. {_TRUST}"
                )
        for (key, value, wanted, std), (other, second, expected, spread) in itertools.combinations(known, 2):
            apart = abs(wanted - expected) > self.min_separation * math.sqrt(std * spread)
            if apart and 2 * _gap(value, second, expected, wanted) < _gap(value, second, wanted, expected):
                raise UserError(
                    f"{self.name}: the means of '{key}' and '{other}' are {value:.6g} and {second:.6g}, and "
                    f"{wanted:.6g} and {expected:.6g} are published: one seems to be in the other's place. {_TRUST}"
                )


def _gap(one: float, other: float, wanted: float, expected: float) -> float:
    return abs(one - wanted) + abs(other - expected)
