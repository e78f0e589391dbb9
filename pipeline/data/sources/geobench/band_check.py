"""Compare the band means of a set with published ones, to detect bands in another order."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.errors import UserError

# In standard deviations: means of other samples of the same pixels differ from the published ones by less.
MEAN_TOLERANCE = 0.2
_HINT = "If the files are right, set check_means: false in the options of the dataset."


@dataclass(frozen=True)
class BandMeanCheck:
    """Check of all band means of a set against published statistics.

    Attributes:
        set_name: for messages.
        published: mean and standard deviation by key; None where nothing is published.
        min_separation: a swap of two bands is detected if their published means differ by more than this, in
            standard deviations.
    """

    set_name: str
    published: Mapping[str, tuple[float, float] | None]
    min_separation: float

    def __call__(self, means: np.ndarray) -> None:
        """Check the means, (band,), in the order of `published`.

        Raises:
            UserError: a mean deviates from the published one, or two bands are swapped.
        """
        checked = [
            (key, float(mean), *stats)
            for mean, (key, stats) in zip(means, self.published.items(), strict=True)
            if stats
        ]
        for key, mean, expected, std in checked:
            if abs(mean - expected) > MEAN_TOLERANCE * std:
                raise UserError(
                    f"{self.set_name}: the mean of '{key}' is {mean:.6g}, but the published mean is {expected:.6g} "
                    f"(standard deviation {std:.6g}). These are not the released files, or their bands are in "
                    f"another order. {_HINT}",
                    key=key,
                    value=mean,
                )
        for band_a, band_b in itertools.combinations(checked, 2):
            key_a, mean_a, expected_a, std_a = band_a
            key_b, mean_b, expected_b, std_b = band_b
            separated = abs(expected_a - expected_b) > self.min_separation * math.sqrt(std_a * std_b)
            deviation = abs(mean_a - expected_a) + abs(mean_b - expected_b)
            swapped_deviation = abs(mean_a - expected_b) + abs(mean_b - expected_a)
            if separated and 2 * swapped_deviation < deviation:
                raise UserError(
                    f"{self.set_name}: the means of '{key_a}' and '{key_b}' are {mean_a:.6g} and {mean_b:.6g}, but "
                    f"the published means are {expected_a:.6g} and {expected_b:.6g}. The two bands seem to be "
                    f"swapped. {_HINT}",
                    key=key_a,
                    value=mean_a,
                )
