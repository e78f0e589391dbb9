"""Images of one's own: any raster that rasterio reads, all bands in one file or a file a band, read by windows."""

import contextlib
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from pyproj import CRS, Transformer
from rasterio.enums import MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from pipeline.errors import UserError

# That an image has no place is said in the store's notes.
warnings.simplefilter("ignore", NotGeoreferencedWarning)


@dataclass(frozen=True)
class RasterImage:
    """One image: its files, and the grid of the first or finest of them.

    Attributes:
        paths: one file with all bands, or one a band, in the bands' order.
        transform: affine coefficients a to f; those of the identity where the file has no place.
        crs: as WKT; empty where it has none.
        dtype: that holds every band.
        bands: how many.
        gaps: whether some of its pixels may hold no data.
    """

    paths: tuple[str, ...]
    height: int
    width: int
    transform: tuple[float, ...]
    crs: str
    dtype: np.dtype
    n_bands: int
    may_have_nodata: bool

    @property
    def name(self) -> str:
        return Path(self.paths[0]).stem

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east and north, in the picture's CRS."""
        x, y = zip(*[self.xy(row, column) for row in (0, self.height) for column in (0, self.width)], strict=True)
        return min(x), min(y), max(x), max(y)

    def read(self, window: Window | None = None, size: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (band, y, x) of a window, or of all resampled to `size`, and which (y, x) of them hold data.

        Raises:
            UserError: a file is damaged.
        """
        shape = (size, size) if size else None
        image = self._pixels(window, shape)
        return image, self._declared(window, shape) & isfinite_mask(image)

    def is_valid(self, window: Window) -> np.ndarray:
        """Where (y, x) all bands of a window hold data: not their nodata, and numbers.

        Raises:
            UserError: a file is damaged.
        """
        declared = self._declared(window, None)
        return declared & isfinite_mask(self._pixels(window, None)) if self.dtype.kind == "f" else declared

    def _pixels(self, window: Window | None, shape: tuple[int, int] | None) -> np.ndarray:
        if len(self.paths) == 1:
            with translate_errors(self.paths[0]):
                out = (self.n_bands, *shape) if shape else None
                return _opened(self.paths[0]).read(out_shape=out, window=window, resampling=Resampling.bilinear)
        return np.stack([self._band(path, window) for path in self.paths])

    def _declared(self, window: Window | None, shape: tuple[int, int] | None) -> np.ndarray:
        """Where (y, x) no file says that a band has no data."""
        if len(self.paths) == 1:
            with translate_errors(self.paths[0]):
                out = (self.n_bands, *shape) if shape else None
                return _opened(self.paths[0]).read_masks(out_shape=out, window=window).all(axis=0)
        return np.stack([self._mask(path, window) for path in self.paths]).all(axis=0)

    def read_bands(self, window: Window, places: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Some bands' pixels (band, y, x) of a window, and where (y, x) all of them hold data.

        Raises:
            UserError: a file is damaged.
        """
        if len(self.paths) == 1:
            with translate_errors(self.paths[0]):
                source, indexes = _opened(self.paths[0]), [place + 1 for place in places]
                image, masks = source.read(indexes, window=window), source.read_masks(indexes, window=window)
        else:
            paths = [self.paths[place] for place in places]
            image = np.stack([self._band(path, window) for path in paths])
            masks = [self._mask(path, window) for path in paths]
        return image, np.stack(masks).all(axis=0) & isfinite_mask(image)

    def _band(self, path: str, window: Window | None) -> np.ndarray:
        """Pixels (y, x) of a band that has a file of its own."""
        with translate_errors(path):
            return _on_grid(path, self).read(1, window=window).astype(self.dtype)

    def _mask(self, path: str, window: Window | None) -> np.ndarray:
        """Where (y, x) such a band has data; 0 is nowhere."""
        with translate_errors(path):
            return _on_grid(path, self).read_masks(1, window=window)

    def resampled_bands(self) -> list[str]:
        """Names of the files that are brought to the grid of another, the finest."""
        return [Path(path).name for path in self.paths if isinstance(_on_grid(path, self), WarpedVRT)]

    def xy(self, row: float, column: float) -> tuple[float, float]:
        """x and y, in the picture's CRS, of a place in pixels from its upper left corner."""
        return rasterio.Affine(*self.transform) @ (column, row)

    def latlon(self, row: float, column: float) -> tuple[float, float]:
        """Latitude and longitude of a place in pixels; not a number where the picture has none."""
        if not self.crs:
            return np.nan, np.nan
        lon, lat = to_latlon(self.crs).transform(*self.xy(row, column))
        return lat, (lon + 180) % 360 - 180 if abs(lon) > 180 else lon  # of grids from 0 to 360 degrees

    def window_transform(self, row: int, column: int) -> tuple[float, ...]:
        """Affine coefficients of a window that begins at a pixel."""
        return tuple(rasterio.Affine(*self.transform) @ rasterio.Affine.translation(column, row))[:6]

    def resampled_transform(self, size: int) -> tuple[float, ...]:
        """Affine coefficients of all of it, resampled to a side of `size` pixels."""
        scale = rasterio.Affine.scale(self.width / size, self.height / size)
        return tuple(rasterio.Affine(*self.transform) @ scale)[:6]


@contextlib.contextmanager
def translate_errors(path: str | Path):
    """What rasterio cannot read becomes an error that names the file."""
    try:
        yield
    except RasterioError as error:
        said = " ".join(str(error).split())
        if "See previous exception" in said:  # which says it of every block anew
            said = "some of its pixels are missing or damaged. Is the file whole?"
        raise UserError(f"{path} cannot be read: {said}") from None


def is_georeferenced(transform: Sequence[float], height: int) -> bool:
    """Whether a transform says a place, and does not just count pixels from a corner."""
    return tuple(transform)[:6] not in ((1, 0, 0, 0, 1, 0), (1, 0, 0, 0, -1, 0), (1, 0, 0, 0, -1, height))


def isfinite_mask(image: np.ndarray) -> np.ndarray:
    """Where (y, x) all bands of an image (band, y, x) are finite numbers."""
    return np.isfinite(image).all(axis=0) if image.dtype.kind == "f" else np.ones(image.shape[1:], bool)


@functools.lru_cache(maxsize=64)
def _opened(path: str):
    return rasterio.open(path)


@functools.lru_cache(maxsize=64)
def _on_grid(path: str, grid: RasterImage):
    """A band's file as if it were on the scene's grid, by nearest neighbour."""
    file = rasterio.open(path)
    if (file.height, file.width) == (grid.height, grid.width) and (
        not (file.crs and grid.crs)
        or (file.crs.to_wkt() == grid.crs and file.transform.almost_equals(rasterio.Affine(*grid.transform), 1e-6))
    ):
        return file
    # Beyond its edge a file without nodata would be zeros, and no mask would say so.
    whole = file.mask_flag_enums[0] == [MaskFlags.all_valid]
    return WarpedVRT(
        file, crs=grid.crs or None, transform=rasterio.Affine(*grid.transform), height=grid.height, width=grid.width,
        resampling=Resampling.nearest, add_alpha=whole,
    )  # fmt: skip


@functools.cache
def to_latlon(crs: str) -> Transformer:
    return Transformer.from_crs(CRS.from_wkt(crs), "EPSG:4326", always_xy=True)
