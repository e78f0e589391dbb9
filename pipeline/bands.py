"""Bands of a sensor, and units of pixel values.

Wavelengths are the band centres of Sentinel-2A, from ESA's spectral response functions. Common names follow the
electro-optical extension of STAC.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from pipeline.config import PositiveFloat
from pipeline.errors import UserError

# Two bands are the same if their centres differ by at most this. It is more than the difference between sensors for
# the same band, and less than the difference between neighbouring bands of one sensor.
WAVELENGTH_TOLERANCE_UM = 0.02
# Value of each unit that equals 1.0: reflectance 1, or full scale of an 8-bit image, or of an image in [0, 1].
FULL_SCALE = {"dn": 10000.0, "reflectance": 1.0, "uint8": 255.0, "display": 1.0}
# Units of RGB images: the reflectance is unknown, and no contrast stretch is needed.
DISPLAY_UNITS = ("uint8", "display")


@dataclass(frozen=True)
class Band:
    """One band of a sensor.

    Attributes:
        name: the sensor's own name, such as `B8A`.
        common_name: the name in STAC, such as `nir08`; backbones name their input bands by it.
        wavelength: centre in micrometres; NaN if the band is not optical (radar, elevation, a cloud mask, a rendered
            image).
        gsd: ground sampling distance of the sensor in metres; NaN if unknown.
    """

    name: str
    common_name: str
    wavelength: Annotated[
        PositiveFloat, Field(lt=50, description="Centre in micrometres; omit it if the band is not optical.")
    ] = math.nan
    gsd: Annotated[PositiveFloat, Field(description="Ground sampling distance in metres.")] = math.nan

    @property
    def is_optical(self) -> bool:
        return not math.isnan(self.wavelength)


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


def band_index(query: str | float, bands: Sequence[Band]) -> int | None:
    """Find a band by its common name, its sensor's name, or its wavelength in micrometres; None if absent."""
    for index, band in enumerate(bands):
        if query in (band.common_name, band.name):
            return index
    try:
        distances = [abs(band.wavelength - float(query)) if band.is_optical else math.inf for band in bands]
    except (ValueError, TypeError):
        return None
    return int(np.argmin(distances)) if min(distances) <= WAVELENGTH_TOLERANCE_UM else None


def sensor(bands: Sequence[Band]) -> str:
    """Return the sensor of images by the names of their optical bands; empty if unknown.

    `sentinel2` has bands named as in `SENTINEL2`. `rgb` is any image without other optical bands than red, green and
    blue, such as an aerial photograph. A band without a wavelength counts if its common name is one of Sentinel-2's.
    """
    sentinel2, common_names = {band.name: band for band in SENTINEL2}, {band.common_name for band in SENTINEL2}
    optical = [band for band in bands if band.is_optical or band.common_name in common_names]

    def is_sentinel2(band: Band) -> bool:
        other = sentinel2.get(band.name, Band("", ""))
        # False for NaN: an unknown wavelength is no difference.
        has_other_wavelength = abs(band.wavelength - other.wavelength) > WAVELENGTH_TOLERANCE_UM
        return band.common_name == other.common_name and not has_other_wavelength

    if optical and all(map(is_sentinel2, optical)):
        return "sentinel2"
    return "rgb" if optical and {band.common_name for band in optical} <= {"red", "green", "blue"} else ""


def full_scale(units: str) -> float:
    """Return the value that equals 1.0 in a unit; UserError for units that are not in `FULL_SCALE`."""
    if units not in FULL_SCALE:
        message = f"Unknown units '{units}'. Known units: {', '.join(FULL_SCALE)}. Correct the dataset's units."
        raise UserError(message, key="units", value=units, allowed=FULL_SCALE)
    return FULL_SCALE[units]
