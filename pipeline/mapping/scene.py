"""A scene to map: its location, bands and units, and its pixels, which are read in windows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import rasterio
from pyproj import Geod

from pipeline.bands import Band, band_index
from pipeline.data.splits import to_latlon
from pipeline.errors import UserError
from pipeline.mapping.predictors import Signature

# Bands of one name whose centre wavelengths differ by more are different bands, in micrometres.
MAX_WAVELENGTH_DIFFERENCE_UM = 0.02
# Models are trained on one pixel size. Scenes whose pixels are larger or smaller by this factor are refused.
MAX_GSD_RATIO = 1.5


@dataclass(frozen=True)
class Scene:
    """One image of any size.

    Attributes:
        name: its path, for messages.
        height, width: its size in pixels.
        transform: affine coefficients a to f, from (column, row) to the CRS; the identity without georeference.
        crs: coordinate reference system as WKT; empty without georeference.
        bands: its bands, as far as known, in order.
        units: units of its values (pipeline/bands.py).
        time: acquisition time, UTC; NaT if unknown.
        fingerprint: changes with its files and its description.
        read_window: a function from a window (row, column, height, width) and band indices to pixels (band, y, x) of
            any dtype, and where (y, x) all of these bands hold data.
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
        """Compute latitude and longitude (…, 2), in degrees, of positions in pixels; NaN without georeference."""
        if not self.crs:
            return np.full((*np.shape(row), 2), np.nan)
        x, y = rasterio.Affine(*self.transform) @ (np.asarray(column, float), np.asarray(row, float))
        lon, lat = to_latlon(self.crs).transform(x, y)
        return np.stack([lat, lon], axis=-1)

    @property
    def gsd(self) -> float:
        """Side of the pixel at the scene's centre in metres; NaN without georeference."""
        if not self.crs:
            return math.nan
        row, column = self.height / 2, self.width / 2
        (lat, lon), (lat_right, lon_right) = self.latlon(np.array([row, row]), np.array([column, column + 1]))
        return Geod(ellps="WGS84").inv(lon, lat, lon_right, lat_right)[2]


def match_scene_bands(scene: Scene, signature: Signature) -> list[int]:
    """Find a model's bands in a scene by name, and check units and pixel size.

    Returns:
        The indices of the model's bands in the scene.

    Raises:
        UserError: a band is missing, or units or pixel size differ.
    """
    indices = [_find_band(band, scene.bands) for band in signature.bands]
    missing = [band.common_name for band, index in zip(signature.bands, indices, strict=True) if index is None]
    if missing:
        present = [_describe_band(band) for band in scene.bands]
        raise UserError(
            f"{scene.name} lacks the bands {', '.join(missing)}, which the model needs. It has {', '.join(present)}. "
            "Bands are matched by common name, and by wavelength where it is stated.",
            key="bands",
            value=missing,
            allowed=present,
            path=scene.name,
        )
    if scene.units != signature.units:
        raise UserError(
            f"{scene.name} is in '{scene.units}', and the model was trained on '{signature.units}'. Convert the "
            "scene, or correct its units if they are stated wrong.",
            key="units",
            value=scene.units,
            allowed=[signature.units],
            path=scene.name,
        )
    ratio = scene.gsd / signature.gsd
    if not math.isnan(ratio) and not 1 / MAX_GSD_RATIO < ratio < MAX_GSD_RATIO:
        raise UserError(
            f"{scene.name} has pixels of {scene.gsd:.3g} m, and the model was trained on {signature.gsd:.3g} m. "
            "Resample the scene first, for instance with gdalwarp -tr.",
            key="gsd",
            value=scene.gsd,
            allowed=[signature.gsd],
            path=scene.name,
        )
    return [index for index in indices if index is not None]


def check_metadata(scene: Scene, metadata_keys: Sequence[str]) -> None:
    """Check that a scene has the location and the time that a model takes as inputs.

    Raises:
        UserError: one of them is missing.
    """
    if "location" in metadata_keys and not scene.crs:
        raise UserError(
            f"The model takes latitude and longitude as inputs, and {scene.name} has no coordinate reference system.",
            key="crs",
            path=scene.name,
        )
    if "time" in metadata_keys and np.isnat(scene.time):
        raise UserError(
            f"The model takes the acquisition time as input, and {scene.name} has none. Describe the scene in a YAML "
            "file with its time.",
            key="time",
            path=scene.name,
        )


def _find_band(band: Band, scene_bands: Sequence[Band]) -> int | None:
    index = band_index(band.common_name, scene_bands)
    index = band_index(band.name, scene_bands) if index is None else index
    if index is None:
        return None
    difference = abs(scene_bands[index].wavelength - band.wavelength)
    return None if difference > MAX_WAVELENGTH_DIFFERENCE_UM else index


def _describe_band(band: Band) -> str:
    return f"{band.common_name} ({band.wavelength} µm)" if band.is_optical else band.common_name
