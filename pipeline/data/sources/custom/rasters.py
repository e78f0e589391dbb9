"""Raster images of any format that rasterio reads: one file, or one file per band, read by windows."""

import contextlib
import functools
import glob
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform as transform_points
from rasterio.windows import Window

from pipeline.bands import Band
from pipeline.data.splits import to_latlon
from pipeline.errors import UserError

# The store's notes state that an image is not georeferenced.
warnings.simplefilter("ignore", NotGeoreferencedWarning)

# Metres per degree of latitude.
METRES_PER_DEGREE = 111_320.0
# Other files of a Shapefile than the one with the ending .shp.
SHAPEFILE_SIDECARS = (".dbf", ".shx", ".prj", ".cpg")


@dataclass(frozen=True)
class RasterImage:
    """One image: its files, and the grid of the first or finest of them.

    Attributes:
        paths: one file with all bands, or one file per band in the order of the bands.
        transform: from (column, row) to the CRS; the identity if the file is not georeferenced.
        crs: as WKT; empty if the file states none.
        dtype: a dtype that represents the values of every band.
    """

    paths: tuple[str, ...]
    height: int
    width: int
    transform: rasterio.Affine
    crs: str
    dtype: np.dtype
    n_bands: int
    may_have_nodata: bool

    @property
    def name(self) -> str:
        """Name of its first file without the ending."""
        return Path(self.paths[0]).stem

    def read(
        self, window: Window | None = None, size: int = 0, bands: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read some or all bands of a window, or of the whole image resampled to `size` pixels.

        Returns pixels (band, y, x), and where (y, x) all of these bands are finite and not nodata. Raises UserError
        for a damaged file.
        """
        pixels = self._read("read", window, size, bands, resampling=Resampling.bilinear)
        return pixels, self._read("read_masks", window, size, bands).all(axis=0) & isfinite_mask(pixels)

    def is_valid(self, window: Window) -> np.ndarray:
        """Return where (y, x) all bands of a window are finite and not nodata; integers are not read for it."""
        if self.dtype.kind == "f":
            return self.read(window)[1]
        return np.asarray(self._read("read_masks", window).all(axis=0))

    def _read(
        self, method: str, window: Window | None, size: int = 0, bands: Sequence[int] | None = None, **options
    ) -> np.ndarray:
        """Call `read` or `read_masks` of the files with some bands, (band, y, x)."""
        bands = range(self.n_bands) if bands is None else bands
        if len(self.paths) == 1:
            files = [(self.paths[0], [band + 1 for band in bands])]
        else:
            files = [(self.paths[band], [1]) for band in bands]
        arrays = []
        for path, indexes in files:
            with translate_rasterio_errors(path):
                shape = (len(indexes), size, size) if size else None
                read = getattr(_open_on_grid(path, self), method)
                arrays.append(read(indexes, window=window, out_shape=shape, **options))
        return np.concatenate(arrays)

    def resampled_bands(self) -> list[str]:
        """Names of the files that are resampled to the grid of the finest."""
        return [Path(path).name for path in self.paths if isinstance(_open_on_grid(path, self), WarpedVRT)]

    def latlon(self, row: float, column: float) -> tuple[float, float]:
        """Latitude and longitude of a point in pixels; NaN if the image states no CRS."""
        if not self.crs:
            return np.nan, np.nan
        lon, lat = to_latlon(self.crs).transform(*self.transform @ (column, row))
        return lat, (lon + 180) % 360 - 180 if abs(lon) > 180 else lon  # for grids from 0 to 360 degrees


@contextlib.contextmanager
def translate_rasterio_errors(path: str | Path):
    """Turn errors of rasterio into a UserError that names the file."""
    try:
        yield
    except RasterioError as error:
        reason = " ".join(str(error).split())
        if "See previous exception" in reason:  # which has one line for each block
            reason = "some of its pixels are missing or damaged. Is the file complete?"
        raise UserError(f"{path} cannot be read: {reason}", path=path) from None


def is_georeferenced(image: RasterImage | rasterio.DatasetReader) -> bool:
    """Whether an image's transform states a location, and does not only count pixels from a corner."""
    pixel_counts = ((1, 0, 0, 0, 1, 0), (1, 0, 0, 0, -1, 0), (1, 0, 0, 0, -1, image.height))
    return tuple(image.transform)[:6] not in pixel_counts


def isfinite_mask(image: np.ndarray) -> np.ndarray:
    """Where (y, x) all bands of an image (band, y, x) are finite."""
    return np.isfinite(image).all(axis=0) if image.dtype.kind == "f" else np.ones(image.shape[1:], bool)


def corners(transform: rasterio.Affine, height: int, width: int) -> tuple[Sequence[float], Sequence[float]]:
    """Return x and y of the four corners of a grid."""
    x, y = zip(*[transform @ (column, row) for column in (0, width) for row in (0, height)], strict=True)
    return x, y


@functools.lru_cache(maxsize=64)
def _open_on_grid(path: str, grid: RasterImage) -> rasterio.DatasetReader | WarpedVRT:
    """Open the file of a band, resampled to the scene's grid by nearest neighbour if it has another grid."""
    file = rasterio.open(path)
    if (file.height, file.width) == (grid.height, grid.width) and (
        not (file.crs and grid.crs)
        or (file.crs.to_wkt() == grid.crs and file.transform.almost_equals(grid.transform, 1e-6))
    ):
        return file
    # Outside a file without nodata value the VRT would return zeros, with no mask, unless it adds an alpha band.
    all_valid = file.mask_flag_enums[0] == [MaskFlags.all_valid]
    return WarpedVRT(
        file, crs=grid.crs or None, transform=grid.transform, height=grid.height, width=grid.width,
        resampling=Resampling.nearest, add_alpha=all_valid,
    )  # fmt: skip


# Files of an image


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Find the files below a folder that match a pattern; of folders only geodatabases (.gdb)."""
    if Path(pattern).is_absolute():
        raise UserError(
            f"{pattern} is an absolute path; patterns are relative to the folder, {folder}.",
            key="folder", value=pattern, path=folder,
        )  # fmt: skip
    matches = map(Path, glob.glob(f"{glob.escape(str(folder))}/{pattern}", recursive=True))
    files = sorted(path for path in matches if path.is_file() or path.suffix.lower() == ".gdb")
    if not files:
        names = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else []
        present = f"It has: {', '.join(names) or 'nothing'}." if folder.is_dir() else "There is no such folder."
        raise UserError(
            f"{folder} has no file like {pattern}. {present}",
            key="folder", value=pattern, allowed=names, path=folder,
        )  # fmt: skip
    return files


def sidecar_files(path: Path) -> list[Path]:
    """List all files of a path: those of a folder, of a Shapefile, or of a raster with its sidecars."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.suffix.lower() == ".shp":
        siblings = path.parent.glob(f"{glob.escape(path.stem)}.*")
        return [path, *sorted(file for file in siblings if file.suffix.lower() in SHAPEFILE_SIDECARS)]
    try:
        with rasterio.open(path) as file:
            return [path, *sorted({Path(name) for name in file.files if Path(name).is_file()} - {path})]
    except RasterioError:  # not a raster, or a damaged one, which `prepare` reports
        return [path]


def has_token(text: str, name: str, before: str = "(?<![0-9A-Za-z])") -> bool:
    """Whether a file name has another as a whole token: tile_1_mask has tile_1, and tile_10_mask does not."""
    return re.search(rf"{before}{re.escape(name)}(?![0-9A-Za-z])", text) is not None


def open_image(paths: Sequence[Path], bands: Sequence[Band]) -> RasterImage:
    """Describe an image: one file with all bands, or one file per band with its name in the file name.

    Raises UserError for a file that cannot be read, has another number or order of bands, or covers another area.
    """
    paths = _match_band_files(paths, bands) if len(paths) > 1 else paths
    with contextlib.ExitStack() as stack:
        files = []
        for path in paths:
            with translate_rasterio_errors(path):
                files.append(stack.enter_context(rasterio.open(path)))
        finest = min(files, key=_pixel_area)
        for path, file in zip(paths, files, strict=True):
            is_alpha = [kind == ColorInterp.alpha for kind in file.colorinterp] if len(paths) > 1 else []
            count, expected = file.count - sum(is_alpha), len(bands) // len(paths)
            if count != expected:
                raise UserError(
                    f"{path} has {count} bands, and {len(bands)} are described. In a scene with one file per "
                    "band, each file has one band.",
                    key="bands", value=file.count, allowed=[expected], path=path,
                )  # fmt: skip
            if any(file.offsets):  # a scale alone is accepted
                raise UserError(
                    f"{path} states an offset ({file.offsets[0]:g}) that is to be added to its scaled values, and "
                    "only stored values are read. Write it with scale and offset applied (gdal_translate -unscale, "
                    "then state the units of the result), or remove the tags if they are wrong.",
                    key="offsets", value=file.offsets[0], path=path,
                )  # fmt: skip
            _check_same_area(path, file, finest)
        if len(files) == 1:
            _check_band_order(paths[0], files[0].descriptions, bands)
        dtype = np.result_type(*(dtype for file in files for dtype in file.dtypes[: len(bands) // len(paths)]))
        if dtype.kind not in "iuf":
            raise UserError(
                f"{paths[0]} has {dtype} values; pixels must be integers or floats.",
                key="dtype", value=str(dtype), path=paths[0],
            )  # fmt: skip
        all_valid = all(flags == [MaskFlags.all_valid] for file in files for flags in file.mask_flag_enums)
        same_grid = all((file.height, file.width) == (finest.height, finest.width) for file in files)
        return RasterImage(
            paths=tuple(map(str, paths)), height=finest.height, width=finest.width, transform=finest.transform,
            crs=finest.crs.to_wkt() if finest.crs else "", dtype=dtype, n_bands=len(bands),
            may_have_nodata=not (all_valid and same_grid) or dtype.kind == "f",
        )  # fmt: skip


def _match_band_files(paths: Sequence[Path], bands: Sequence[Band]) -> list[Path]:
    """Return the file of each band, whose name must be in the name of exactly one file."""
    band_paths = []
    for band in bands:
        matches = [path for path in paths if has_token(path.stem, band.name)]
        if not matches and band.name[0].isupper():  # a capitalized name may end a lower-case word, as in sceneB02
            matches = [path for path in paths if has_token(path.stem, band.name, before="(?<=[a-z])")]
        if len(matches) != 1 or matches[0] in band_paths:
            names = [path.name for path in (matches or paths)]
            raise UserError(
                f"Band {band.name} should be in the name of one file; it is in {len(matches)} of: "
                f"{', '.join(names[:8])}. No capital letter or digit may touch it there, and no other band may have "
                "the same file. A scene, which maps and polygons need, is one file with all bands or one file per "
                "band. Put unlabelled scenes of one file per band into a folder each.",
                key=band.name, value=len(matches), allowed=names,
            )  # fmt: skip
        band_paths.append(matches[0])
    return band_paths


def _check_band_order(path: Path, descriptions: Sequence[str | None], bands: Sequence[Band]) -> None:
    """Refuse a file that names the same bands as the options, in another order."""
    file_names = [(name or "").strip().casefold() for name in descriptions]
    for attribute in ("name", "common_name"):
        expected = [getattr(band, attribute).casefold() for band in bands]
        if file_names != expected and sorted(file_names) == sorted(expected):
            raise UserError(
                f"{path} names its bands {', '.join(file_names)}, and the options list {', '.join(expected)}. List "
                "the bands in the order of the file, or correct the descriptions in the file.",
                key="bands", value=tuple(file_names), allowed=expected, path=path,
            )  # fmt: skip


def _check_same_area(path: Path, file: rasterio.DatasetReader, finest: rasterio.DatasetReader) -> None:
    """Refuse a band's file that does not cover, within a pixel, the area of the finest file."""
    if not (is_georeferenced(file) and is_georeferenced(finest)):
        return
    x, y = corners(finest.transform, finest.height, finest.width)
    if file.crs and finest.crs:
        x, y = transform_points(finest.crs, file.crs, x, y)
    columns, rows = zip(*[~file.transform @ point for point in zip(x, y, strict=True)], strict=True)
    if min(*columns, *rows) < -1 or max(columns) > file.width + 1 or max(rows) > file.height + 1:
        raise UserError(
            f"{path} does not cover the area of {finest.name}; all bands of a scene must cover the same area.",
            key="images", path=path,
        )  # fmt: skip


def _pixel_area(file: rasterio.DatasetReader) -> float:
    """Approximate area of a pixel in square metres; in the file's own units if it states no CRS."""
    a, b, _, d, e, _ = tuple(file.transform)[:6]
    area = abs(a * e - b * d)
    if not file.crs:
        return area
    if not file.crs.is_geographic:
        return area * file.crs.linear_units_factor[1] ** 2
    _, lat = file.transform @ (file.width / 2, file.height / 2)
    return area * METRES_PER_DEGREE**2 * math.cos(math.radians(lat))
