"""A scene to map: where it lies, what its bands and units are, and its pixels by windows, never whole."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import rasterio
from pyproj import CRS, Geod, Transformer

from pipeline.bands import Band, band_index
from pipeline.errors import UserError
from pipeline.mapping.signature import Signature

# Bands of the same name whose centres are farther apart, in micrometres, are not the same band.
_APART = 0.02
# A model has learnt what a pixel of its size looks like; larger or smaller ones by this factor are refused.
_OTHER_SCALE = 1.5


@dataclass(frozen=True)
class Scene:
    """One image of any size.

    Attributes:
        name: for messages.
        transform: affine coefficients a to f, from (column, row) to the CRS; the identity's where it has no place.
        crs: as WKT; empty where it has none.
        bands: as far as known, in the scene's order.
        units: of its values (pipeline/bands.py).
        time: when it was taken, UTC; not a time where unknown.
        state: what tells this scene from any other, and from itself when it has changed.
        read: from (row, column, height, width) and places of bands to pixels (band, y, x) of any type, and where
            (y, x) all of them hold data.
    """

    name: str
    height: int
    width: int
    transform: tuple[float, ...]
    crs: str
    bands: tuple[Band, ...]
    units: str
    time: np.datetime64
    fingerprint: str
    read_window: Callable[[tuple[int, int, int, int], Sequence[int]], tuple[np.ndarray, np.ndarray]]

    def latlon(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Latitude and longitude (…, 2) in degrees of places in pixels; not a number where the scene has none."""
        if not self.crs:
            return np.full((*np.shape(row), 2), np.nan)
        x, y = rasterio.Affine(*self.transform) @ (np.asarray(column, float), np.asarray(row, float))
        lon, lat = _to_latlon(self.crs).transform(x, y)
        return np.stack([lat, lon], axis=-1)

    @property
    def gsd(self) -> float:
        """Side of a pixel in metres at the scene's centre; not a number where the scene has no place."""
        if not self.crs:
            return math.nan
        row, column = self.height / 2, self.width / 2
        (lat, lon), (lat_right, lon_right) = self.latlon(np.array([row, row]), np.array([column, column + 1]))
        return Geod(ellps="WGS84").inv(lon, lat, lon_right, lat_right)[2]


def match_scene_bands(scene: Scene, wanted: Signature) -> list[int]:
    """Where a model's bands are in a scene.

    Raises:
        UserError: a band that is not there, other units, or pixels of another size.
    """
    found = [_place(band, scene.bands) for band in wanted.bands]
    if gone := [band.common_name for band, place in zip(wanted.bands, found, strict=True) if place is None]:
        there = ", ".join(_said(band) for band in scene.bands)
        raise UserError(
            f"{scene.name} lacks the bands {', '.join(gone)} that the model was trained with; it has {there}. "
            "A band is known by its common name, and its wavelength where that is stated."
        )
    if scene.units != wanted.units:
        raise UserError(
            f"{scene.name} is in '{scene.units}', and the model was trained on '{wanted.units}'. Give it a scene in "
            f"'{wanted.units}', or correct the scene's units if they are stated wrong."
        )
    ratio = scene.gsd / wanted.gsd
    if not math.isnan(ratio) and not 1 / _OTHER_SCALE < ratio < _OTHER_SCALE:
        raise UserError(
            f"{scene.name} has pixels of {scene.gsd:.3g} m, and the model was trained on {wanted.gsd:.3g} m. "
            "Resample it first, for instance with gdalwarp -tr."
        )
    return found


def check_metadata(scene: Scene, names: Sequence[str]) -> None:
    """Refuse a scene that lacks a place or a time which the model is told.

    Raises:
        UserError: which is missing.
    """
    if "place" in names and not scene.crs:
        raise UserError(f"The model is told where it looks, and {scene.name} has no coordinate reference system.")
    if "time" in names and np.isnat(scene.time):
        raise UserError(f"The model is told when it looks; describe {scene.name} in a YAML file with its time.")


def _place(band: Band, there: Sequence[Band]) -> int | None:
    place = band_index(band.common_name, there)
    place = band_index(band.name, there) if place is None else place
    if place is None:
        return None
    apart = abs(there[place].wavelength - band.wavelength)
    return None if apart > _APART else place


def _said(band: Band) -> str:
    return f"{band.common_name} ({band.wavelength} µm)" if band.is_optical else band.common_name


@functools.cache
def _to_latlon(crs: str) -> Transformer:
    return Transformer.from_crs(CRS.from_wkt(crs), "EPSG:4326", always_xy=True)
