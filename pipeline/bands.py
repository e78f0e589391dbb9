"""Bands: names, wavelengths and units, and the one rule for whether a backbone can see a dataset.

Wavelengths are Sentinel-2A's band centres from ESA's spectral response functions; the common names are
those of the STAC electro-optical extension.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.backbones.base import BackboneSpec, InputBands
from pipeline.errors import UserError

# Bands of the same name on two sensors differ by less than this, in micrometres; neighbours of one by more.
_NEAR = 0.02
# How many of a unit make 1.0: reflectance of 1, or full scale of an 8-bit camera, or of one scaled to [0, 1].
FULL_SCALE = {"dn": 10000.0, "reflectance": 1.0, "uint8": 255.0, "display": 1.0}
# Units that are a picture already: nothing is known of its reflectance, and nothing needs to be stretched.
PICTURES = ("uint8", "display")


@dataclass(frozen=True)
class Band:
    """One band of a sensor.

    Attributes:
        name: the sensor's own name, such as `B8A`.
        common_name: the field's name, such as `nir08`; what backbones ask for.
        wavelength: centre in micrometres; not a number for what is no optical band: radar, elevation, a cloud mask,
            a rendered picture.
        gsd: ground sampling distance at which it was taken, in metres; not a number where it is not known.
    """

    name: str
    common_name: str
    wavelength: float = math.nan
    gsd: float = math.nan

    @property
    def optical(self) -> bool:
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


class MissingBandsError(UserError):
    """A backbone cannot see these images; the message says why."""


def band_index(wanted: str | float, bands: Sequence[Band]) -> int | None:
    """The place of a band, by its common name, the sensor's name or its wavelength (the nearest within 0.02 µm)."""
    for place, band in enumerate(bands):
        if wanted in (band.common_name, band.name):
            return place
    try:
        distances = [abs(band.wavelength - float(wanted)) if band.optical else math.inf for band in bands]
    except (ValueError, TypeError):
        return None
    return int(np.argmin(distances)) if min(distances) <= _NEAR else None


def match_bands(
    name: str, spec: BackboneSpec, bands: Sequence[Band], input_size: int, requested: Sequence[str | float] = ()
) -> InputBands:
    """Which of the images' bands go into which of a backbone's inputs.

    The rule: every band that it needs is there; a band that it can do without is left away; all optical bands
    go into one that takes any.

    Args:
        name: the backbone's, for the message.
        bands: the images'.
        wanted: bands to use in place of the backbone's own, by name or wavelength; those that it does not know by
            name, in the order of its inputs.

    Raises:
        Unseen: a band that is needed, or wanted, is not there.
        UserError: bands wanted that do not fit its inputs.
    """
    if requested:
        places = [band_index(one, bands) for one in requested]
        needs = requested
        slots = requested if None in places else _slots(name, spec, [bands[place] for place in places], requested)
    else:
        slots = spec.bands or [band.common_name for band in bands if band.optical]
        needs = slots if spec.needs is None else spec.needs
        places = [band_index(slot, bands) for slot in slots]
        for at, slot in enumerate(slots):
            if places[at] is None and slot in spec.instead:
                places[at] = band_index(spec.instead[slot], bands)
    if gone := [str(slot) for slot, place in zip(slots, places, strict=True) if place is None and slot in needs]:
        there = ", ".join(band.common_name for band in bands)
        raise MissingBandsError(f"{name} needs the bands {', '.join(gone)}; these images have {there}.")
    used = [(slot, place) for slot, place in zip(slots, places, strict=True) if place is not None]
    if spec.bands:
        used.sort(key=lambda one: spec.bands.index(one[0]))
    return InputBands(
        slots=tuple(slot for slot, _ in used),
        positions=tuple(place for _, place in used),
        wavelengths=tuple(float(bands[place].wavelength) if bands[place].optical else None for _, place in used),
        input_size=input_size,
    )


def _slots(name: str, spec: BackboneSpec, chosen: Sequence[Band], wanted: Sequence) -> Sequence[str]:
    """The network's inputs for bands chosen by hand: by name if it knows all of them, else in order."""
    if spec.bands is None:
        return [band.common_name for band in chosen]
    takes = {**{slot: slot for slot in spec.bands}, **{other: slot for slot, other in spec.instead.items()}}
    named = [takes.get(band.common_name) for band in chosen]
    whole = len(chosen) == len(spec.bands)
    if None not in named and len(set(named)) == len(named) and (whole or spec.needs is not None):
        return named
    if whole:
        return spec.bands
    raise UserError(
        f"{name} takes the bands {', '.join(spec.bands)}{'' if spec.needs is None else ' or some of them'}; its "
        f"bands in params.yaml are {', '.join(map(str, wanted))}."
    )


def full_scale(units: str) -> float:
    """How many of a declared unit make 1.0.

    Raises:
        UserError: units that are not declared here; they are never guessed from magnitudes.
    """
    if units not in FULL_SCALE:
        raise UserError(f"Units '{units}' are not known. Known units: {', '.join(FULL_SCALE)}.")
    return FULL_SCALE[units]
