"""Images of one's own: any raster that rasterio reads, all bands in one file or a file a band, read by windows."""

import contextlib
import functools
import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from pyproj import CRS, Transformer
from rasterio.enums import MaskFlags, Resampling
from rasterio.errors import RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform as warp
from rasterio.windows import Window

from pipeline.bands import Band
from pipeline.errors import UserError


@dataclass(frozen=True)
class Picture:
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
    bands: int
    gaps: bool

    @property
    def name(self) -> str:
        return Path(self.paths[0]).stem

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east and north, in the picture's CRS."""
        x, y = zip(*[self.place(row, column) for row in (0, self.height) for column in (0, self.width)], strict=True)
        return min(x), min(y), max(x), max(y)

    def read(self, window: Window | None = None, size: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (band, y, x) of a window, or of all resampled to `size`, and which (y, x) of them hold data.

        Raises:
            UserError: a file is damaged.
        """
        shape = (size, size) if size else None
        image = self._pixels(window, shape)
        return image, self._declared(window, shape) & numbers(image)

    def valid(self, window: Window) -> np.ndarray:
        """Where (y, x) all bands of a window hold data: not their nodata, and numbers.

        Raises:
            UserError: a file is damaged.
        """
        declared = self._declared(window, None)
        return declared & numbers(self._pixels(window, None)) if self.dtype.kind == "f" else declared

    def _pixels(self, window: Window | None, shape: tuple[int, int] | None) -> np.ndarray:
        if len(self.paths) == 1:
            with reading(self.paths[0]):
                out = (self.bands, *shape) if shape else None
                return _opened(self.paths[0]).read(out_shape=out, window=window, resampling=Resampling.bilinear)
        return np.stack([self._band(path, window)[0] for path in self.paths])

    def _declared(self, window: Window | None, shape: tuple[int, int] | None) -> np.ndarray:
        """Where (y, x) no file says that a band has no data."""
        whole = None
        for path in self.paths:
            with reading(path):
                file = _opened(path) if len(self.paths) == 1 else _on_grid(path, self)
                out = (file.count, *shape) if shape else None
                mask = file.read_masks(out_shape=out, window=window).all(axis=0)
            whole = mask if whole is None else whole & mask
        return whole

    def bands_of(self, window: Window, places: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Some bands' pixels (band, y, x) of a window, and where (y, x) all of them hold data.

        Raises:
            UserError: a file is damaged.
        """
        if len(self.paths) == 1:
            with reading(self.paths[0]):
                source, indexes = _opened(self.paths[0]), [place + 1 for place in places]
                image, masks = source.read(indexes, window=window), source.read_masks(indexes, window=window)
        else:
            image, masks = zip(*[self._band(self.paths[place], window, masked=True) for place in places], strict=True)
            image = np.stack(image)
        return image, np.stack(masks).all(axis=0) & numbers(image)

    def _band(self, path: str, window: Window | None, masked: bool = False):
        """Pixels (y, x) of a band that has a file of its own, and, if asked for, its mask."""
        with reading(path):
            file = _on_grid(path, self)
            mask = file.read_masks(1, window=window) if masked else None
            return file.read(1, window=window).astype(self.dtype), mask

    def coarser(self) -> list[str]:
        """Names of the files that are brought to the grid of another, the finest."""
        return [Path(path).name for path in self.paths if isinstance(_on_grid(path, self), WarpedVRT)]

    def place(self, row: float, column: float) -> tuple[float, float]:
        """x and y, in the picture's CRS, of a place in pixels from its upper left corner."""
        return rasterio.Affine(*self.transform) @ (column, row)

    def latlon(self, row: float, column: float) -> tuple[float, float]:
        """Latitude and longitude of a place in pixels; not a number where the picture has none."""
        if not self.crs:
            return np.nan, np.nan
        lon, lat = to_latlon(self.crs).transform(*self.place(row, column))
        return lat, lon

    def window_transform(self, row: int, column: int) -> tuple[float, ...]:
        """Affine coefficients of a window that begins at a pixel."""
        return tuple(rasterio.Affine(*self.transform) @ rasterio.Affine.translation(column, row))[:6]

    def resampled_transform(self, size: int) -> tuple[float, ...]:
        """Affine coefficients of all of it, resampled to a side of `size` pixels."""
        scale = rasterio.Affine.scale(self.width / size, self.height / size)
        return tuple(rasterio.Affine(*self.transform) @ scale)[:6]


def files(folder: Path, patterns: str | Sequence[str]) -> list[Path]:
    """Files below a folder that fit a pattern, or several.

    Raises:
        UserError: nothing fits.
    """
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    if absolute := [one for one in wanted if Path(one).is_absolute()]:
        raise UserError(f"{absolute[0]} is an absolute path; patterns are below the folder, {folder}.")
    found = sorted({Path(path) for one in wanted for path in glob.glob(str(folder / one), recursive=True)})
    if not found:
        there = sorted(one.name for one in folder.iterdir())[:8] if folder.is_dir() else []
        has = f"It has: {', '.join(there) or 'nothing'}." if folder.is_dir() else "There is no such folder."
        raise UserError(f"{folder} has no file like {', '.join(wanted)}. {has}")
    return found


def contains(text: str, name: str) -> bool:
    """Whether a file's name has another, whole: tile_1_mask has tile_1, and tile_10_mask has not."""
    return re.search(rf"(?<![0-9A-Za-z]){re.escape(name)}(?![0-9A-Za-z])", text) is not None


def picture(path: Path, bands: Sequence[Band]) -> Picture:
    """One file with all bands.

    Raises:
        UserError: it cannot be read, or has another number of bands.
    """
    with reading(path), rasterio.open(path) as file:
        if file.count != len(bands):
            raise UserError(f"{path} has {file.count} bands, and {len(bands)} are described.")
        _check_order(path, file.descriptions, bands)
        _check_offsets(file)
        kind = np.result_type(*file.dtypes)
        return _described((str(path),), [file], file, kind, len(bands))


def scene(paths: Sequence[Path], bands: Sequence[Band]) -> Picture:
    """One scene: a file with all bands, or a file a band, found by the band's name in the file's.

    Raises:
        UserError: files that are not those of the bands.
    """
    if len(paths) == 1:
        return picture(paths[0], bands)
    chosen = []
    for band in bands:
        fit = [path for path in paths if contains(path.stem, band.name)]
        fit = fit or [path for path in paths if band.name in path.stem]
        if len(fit) != 1:
            names = ", ".join(path.name for path in (fit or paths)[:8])
            raise UserError(
                f"Band {band.name} should be in the name of one file; it is in {len(fit)} of: {names}. "
                "A scene, which maps and polygons are of, is one file with all bands, or a file a band. Unlabelled "
                "scenes of a file a band lie in a folder each."
            )
        chosen.append(fit[0])
    with contextlib.ExitStack() as stack:
        opened = []
        for path in chosen:
            with reading(path):
                opened.append(stack.enter_context(rasterio.open(path)))
        finest = min(opened, key=lambda file: abs(file.transform.a))
        for path, file in zip(chosen, opened, strict=True):
            _check_ground(path, file, finest)
            _check_offsets(file)
        kind = np.result_type(*[file.dtypes[0] for file in opened])
        return _described(tuple(map(str, chosen)), opened, finest, kind, len(bands))


@contextlib.contextmanager
def reading(path: str | Path):
    """What rasterio cannot read becomes an error that names the file."""
    try:
        yield
    except RasterioError as error:
        said = " ".join(str(error).split())
        if "See previous exception" in said:  # which says it of every block anew
            said = "some of its pixels are missing or damaged. Is the file whole?"
        raise UserError(f"{path} cannot be read: {said}") from None


def _check_order(path: Path, said: Sequence[str | None], bands: Sequence[Band]) -> None:
    """Raises UserError if a file names the described bands itself, and in another order."""
    said = [(name or "").strip().casefold() for name in said]
    for kind in ("name", "common_name"):
        wanted = [getattr(band, kind).casefold() for band in bands]
        if said != wanted and sorted(said) == sorted(wanted):
            raise UserError(
                f"{path} says that its bands are {', '.join(said)}, and they are described as {', '.join(wanted)}. "
                "List the bands in the file's order, or correct its descriptions."
            )


def _check_ground(path: Path, file, finest) -> None:
    """Raises UserError if a band's file does not show all the ground that the finest does, within a pixel."""
    if not (file.crs and finest.crs):
        return
    corners = [finest.transform @ (column, row) for column in (0, finest.width) for row in (0, finest.height)]
    x, y = warp(finest.crs, file.crs, *zip(*corners, strict=True))
    columns, rows = zip(*[~file.transform @ point for point in zip(x, y, strict=True)], strict=True)
    if min(*columns, *rows) < -1 or max(columns) > file.width + 1 or max(rows) > file.height + 1:
        raise UserError(f"{path} does not show the ground that {finest.name} shows; a scene's bands show the same.")


def _check_offsets(file) -> None:
    """Raises UserError if a file's stored values are not its values but for a scale."""
    if any(file.offsets):
        raise UserError(
            f"{file.name} states an offset ({file.offsets[0]:g}) that is to be added to its scaled values, and only "
            "stored values are read. Write it with scale and offset applied (gdal_translate -unscale, then the units "
            "that it has), or take the tags off if they are wrong."
        )


def numbers(image: np.ndarray) -> np.ndarray:
    """Where (y, x) all bands of an image (band, y, x) are finite numbers."""
    return np.isfinite(image).all(axis=0) if image.dtype.kind == "f" else np.ones(image.shape[1:], bool)


def _described(paths, files, grid, dtype, bands: int) -> Picture:
    crs = grid.crs.to_wkt() if grid.crs else ""
    whole = all(flags == [MaskFlags.all_valid] for file in files for flags in file.mask_flag_enums)
    gaps = not whole or np.dtype(dtype).kind == "f"
    return Picture(paths, grid.height, grid.width, tuple(grid.transform)[:6], crs, np.dtype(dtype), bands, gaps)


@functools.lru_cache(maxsize=64)
def _opened(path: str):
    return rasterio.open(path)


@functools.lru_cache(maxsize=64)
def _on_grid(path: str, grid: Picture):
    """A band's file as if it were on the scene's grid, by nearest neighbour."""
    file = rasterio.open(path)
    if (file.height, file.width) == (grid.height, grid.width) and (
        not (file.crs and grid.crs)
        or (file.crs.to_wkt() == grid.crs and file.transform.almost_equals(rasterio.Affine(*grid.transform), 1e-6))
    ):
        return file
    return WarpedVRT(
        file, crs=grid.crs or None, transform=rasterio.Affine(*grid.transform), height=grid.height, width=grid.width,
        resampling=Resampling.nearest,
    )  # fmt: skip


@functools.cache
def to_latlon(crs: str) -> Transformer:
    return Transformer.from_crs(CRS.from_wkt(crs), "EPSG:4326", always_xy=True)
