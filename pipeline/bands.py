"""Bands: names, wavelengths and units, and the one rule for whether a backbone can see a dataset.

Wavelengths are Sentinel-2A's band centres from ESA's spectral response functions; the common names are
those of the STAC electro-optical extension.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import UserError

# How many of a unit make 1.0: reflectance of 1, or full scale of an 8-bit camera.
FULL_SCALE = {"dn": 10000.0, "reflectance": 1.0, "uint8": 255.0}


@dataclass(frozen=True)
class Band:
    """One band of a sensor.

    Attributes:
        name: the sensor's own name, such as `B8A`.
        common_name: the field's name, such as `nir08`; what backbones ask for.
        wavelength: centre in micrometres.
        gsd: ground sampling distance at which it was taken, in metres.
    """

    name: str
    common_name: str
    wavelength: float
    gsd: float


SENTINEL2 = (
    Band("B01", "coastal", 0.443, 60),
    Band("B02", "blue", 0.492, 10),
    Band("B03", "green", 0.560, 10),
    Band("B04", "red", 0.665, 10),
    Band("B05", "rededge071", 0.704, 20),
    Band("B06", "rededge075", 0.741, 20),
    Band("B07", "rededge078", 0.783, 20),
    Band("B08", "nir", 0.833, 10),
    Band("B8A", "nir08", 0.865, 20),
    Band("B09", "nir09", 0.945, 60),
    Band("B10", "cirrus", 1.374, 60),
    Band("B11", "swir16", 1.614, 20),
    Band("B12", "swir22", 2.202, 20),
)


def missing(wanted: Sequence[str], available: Sequence[str]) -> list[str]:
    """Common names that are wanted and not available."""
    return [name for name in wanted if name not in available]


def left_out(name: str, wanted: Sequence[str] | None, available: Sequence[str]) -> str | None:
    """Why a backbone cannot see images with these bands, or None.

    The rule: every band that it was trained on is there. `wanted` None takes whatever bands there are.
    """
    gone = missing(wanted or available, available)
    return f"{name} needs the bands {', '.join(gone)}; these images have {', '.join(available)}." if gone else None


def select(wanted: Sequence[str], available: Sequence[str]) -> list[int]:
    """Positions in `available` of the wanted common names, in the wanted order.

    Raises:
        UserError: a wanted band is not there; the message names the ones that are.
    """
    gone = missing(wanted, available)
    if gone:
        raise UserError(
            f"Bands {', '.join(gone)} are wanted, but these images have {', '.join(available)}. "
            "Leave the backbone out for this dataset, or prepare the images with these bands."
        )
    return [list(available).index(name) for name in wanted]


def to_unit_scale(values: np.ndarray, units: str) -> np.ndarray:
    """Values in declared units to float32 where 1.0 is full reflectance or full 8-bit scale.

    Raises:
        UserError: units that are not declared here; they are never guessed from magnitudes.
    """
    if units not in FULL_SCALE:
        raise UserError(f"Units '{units}' are not known. Known units: {', '.join(FULL_SCALE)}.")
    return values.astype(np.float32) / np.float32(FULL_SCALE[units])
