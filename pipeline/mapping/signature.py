"""What a model takes and gives, as far as a map needs to know."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.bands import Band
from pipeline.errors import UserError
from pipeline.tasks import TASKS


@dataclass(frozen=True)
class Signature:
    """A model from chips to classes.

    Attributes:
        task: `classification`, `multilabel` or `segmentation`.
        classes: their names.
        bands: of the chips, in order.
        units: of the chips' values (pipeline/bands.py).
        gsd: ground sampling distance in metres; not a number where it is not known.
        size: (y, x) of a chip in pixels.
        context: what else it is told: `place`, `time`.
    """

    task: str
    classes: tuple[str, ...]
    bands: tuple[Band, ...]
    units: str
    gsd: float
    size: tuple[int, int]
    extra_inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Predictor:
    """A model that is ready to map.

    Attributes:
        name: for the map's tags.
        digest: SHA-256 of everything that decides what it predicts.
        logits: from chips, float32 (batch, band, y, x) in the signature's bands and units, and where and when they
            were taken (`place` (batch, 2): latitude and longitude of their centres in degrees; `time` (batch,):
            UTC, datetime64[s]), to float32 (batch, class) or (batch, class, y, x).
    """

    name: str
    digest: str
    signature: Signature
    predict_logits: Callable[[np.ndarray, Mapping[str, np.ndarray]], np.ndarray]


def parse_signature(told: Mapping, where: str) -> Signature:
    """The signature that a student's description tells, in student.json or in an exported file.

    Raises:
        UserError: something is missing.
    """
    try:
        bands = tuple(Band(one["name"], one["common_name"], _number(one["wavelength"])) for one in told["bands"])
        made = Signature(
            told["task"], tuple(told["classes"]), bands, told["units"], _number(told["gsd"]),
            tuple(int(side) for side in told["size"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} does not say what it takes and gives ({error!r}). Export it again.") from None
    if made.task not in TASKS or len(made.size) != 2:
        raise UserError(f"{where} is for the task '{made.task}' on chips of {made.size}, which cannot be mapped.")
    return made


def class_probabilities(logits: np.ndarray, task: str) -> np.ndarray:
    """Probabilities of the classes, second of the axes; float32."""
    if task == "multilabel":
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _number(value) -> float:
    return float("nan") if value is None else float(value)
