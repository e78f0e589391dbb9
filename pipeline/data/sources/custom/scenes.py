"""From files to pictures: which file has which band, and whether they fit what is described."""

import contextlib
import glob
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import RasterioError
from rasterio.warp import transform as warp

from pipeline.bands import Band
from pipeline.data.sources.custom.rasters import RasterImage, is_georeferenced, translate_errors
from pipeline.errors import UserError

# Metres in a degree of latitude, for pixels that are given in degrees.
_DEGREE = 111_320.0
# Of one's files besides those that a pattern fits: what a Shapefile keeps elsewhere.
_BESIDE = (".dbf", ".shx", ".prj", ".cpg")


def find_files(folder: Path, patterns: str | Sequence[str]) -> list[Path]:
    """Files below a folder that fit a pattern, or several; of folders, geodatabases alone.

    Raises:
        UserError: nothing fits.
    """
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    if absolute := [one for one in wanted if Path(one).is_absolute()]:
        raise UserError(f"{absolute[0]} is an absolute path; patterns are below the folder, {folder}.")
    fit = {Path(path) for one in wanted for path in glob.glob(f"{glob.escape(str(folder))}/{one}", recursive=True)}
    found = sorted(path for path in fit if path.is_file() or path.suffix.lower() == ".gdb")
    if not found:
        there = sorted(one.name for one in folder.iterdir())[:8] if folder.is_dir() else []
        has = f"It has: {', '.join(there) or 'nothing'}." if folder.is_dir() else "There is no such folder."
        raise UserError(f"{folder} has no file like {', '.join(wanted)}. {has}")
    return found


def sidecar_files(path: Path) -> list[Path]:
    """The files that one's content is in: of a folder all, of a Shapefile or raster also those that belong to it."""
    if path.is_dir():
        return sorted(one for one in path.rglob("*") if one.is_file())
    if path.suffix.lower() == ".shp":
        near = path.parent.glob(f"{glob.escape(path.stem)}.*")
        return [path, *sorted(one for one in near if one.suffix.lower() in _BESIDE)]
    try:
        with rasterio.open(path) as file:
            return [path, *sorted({Path(one) for one in file.files if Path(one).is_file()} - {path})]
    except RasterioError:  # no raster, or a damaged one: prepare says which
        return [path]


def has_token(text: str, name: str) -> bool:
    """Whether a file's name has another, whole: tile_1_mask has tile_1, and tile_10_mask has not."""
    return re.search(rf"(?<![0-9A-Za-z]){re.escape(name)}(?![0-9A-Za-z])", text) is not None


def _has_suffix_token(text: str, name: str) -> bool:
    """Whether a name with a capital ends a word in small letters: sceneB02 ends with B02, sceneB8A not with B8."""
    return name[0].isupper() and re.search(rf"(?<=[a-z]){re.escape(name)}(?![0-9A-Za-z])", text) is not None


def open_image(path: Path, bands: Sequence[Band]) -> RasterImage:
    """One file with all bands.

    Raises:
        UserError: it cannot be read, or has another number of bands.
    """
    with translate_errors(path), rasterio.open(path) as file:
        if file.count != len(bands):
            raise UserError(f"{path} has {file.count} bands, and {len(bands)} are described.")
        _check_order(path, file.descriptions, bands)
        _check_offsets(file)
        kind = np.result_type(*file.dtypes)
        return _described((str(path),), [file], file, kind, len(bands))


def open_scene_files(paths: Sequence[Path], bands: Sequence[Band]) -> RasterImage:
    """One scene: a file with all bands, or a file a band, found by the band's name in the file's.

    Raises:
        UserError: files that are not those of the bands.
    """
    if len(paths) == 1:
        return open_image(paths[0], bands)
    chosen = []
    for band in bands:
        fit = [path for path in paths if has_token(path.stem, band.name)]
        fit = fit or [path for path in paths if _has_suffix_token(path.stem, band.name)]
        if len(fit) != 1 or fit[0] in chosen:
            names = ", ".join(path.name for path in (fit or paths)[:8])
            raise UserError(
                f"Band {band.name} should be in the name of one file; it is in {len(fit)} of: {names}. No capital "
                "or digit may touch it there, and no other band have that file. A scene, which maps and polygons are "
                "of, is one file with all bands, or a file a band. Unlabelled scenes of a file a band lie in a "
                "folder each."
            )
        chosen.append(fit[0])
    with contextlib.ExitStack() as stack:
        opened = []
        for path in chosen:
            with translate_errors(path):
                opened.append(stack.enter_context(rasterio.open(path)))
        finest = min(opened, key=_pixel)
        for path, file in zip(chosen, opened, strict=True):
            if sum(kind != ColorInterp.alpha for kind in file.colorinterp) != 1:
                raise UserError(f"{path} has {file.count} bands; of a scene in a file a band, each has one.")
            _check_ground(path, file, finest)
            _check_offsets(file)
        kind = np.result_type(*[file.dtypes[0] for file in opened])
        return _described(tuple(map(str, chosen)), opened, finest, kind, len(bands))


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
    if not is_georeferenced(file.transform, file.height) or not is_georeferenced(finest.transform, finest.height):
        return
    corners = [finest.transform @ (column, row) for column in (0, finest.width) for row in (0, finest.height)]
    x, y = zip(*corners, strict=True)
    if file.crs and finest.crs:
        x, y = warp(finest.crs, file.crs, x, y)
    columns, rows = zip(*[~file.transform @ point for point in zip(x, y, strict=True)], strict=True)
    if min(*columns, *rows) < -1 or max(columns) > file.width + 1 or max(rows) > file.height + 1:
        raise UserError(f"{path} does not show the ground that {finest.name} shows; a scene's bands show the same.")


def _pixel(file) -> float:
    """The area of a pixel on the ground, in square metres, roughly; in its own units where the file has no system."""
    a, b, _, d, e, _ = tuple(file.transform)[:6]
    area = abs(a * e - b * d)
    if not file.crs:
        return area
    if not file.crs.is_geographic:
        return area * file.crs.linear_units_factor[1] ** 2
    _, lat = file.transform @ (file.width / 2, file.height / 2)
    return area * _DEGREE**2 * math.cos(math.radians(lat))


def _check_offsets(file) -> None:
    """Raises UserError if a file's stored values are not its values but for a scale."""
    if any(file.offsets):
        raise UserError(
            f"{file.name} states an offset ({file.offsets[0]:g}) that is to be added to its scaled values, and only "
            "stored values are read. Write it with scale and offset applied (gdal_translate -unscale, then the units "
            "that it has), or take the tags off if they are wrong."
        )


def _described(paths, files, grid, dtype, bands: int) -> RasterImage:
    if np.dtype(dtype).kind not in "iuf":
        raise UserError(f"{paths[0]} has {dtype} values; pixels are whole numbers or floats.")
    crs = grid.crs.to_wkt() if grid.crs else ""
    whole = all(flags == [MaskFlags.all_valid] for file in files for flags in file.mask_flag_enums)
    same = all((file.height, file.width) == (grid.height, grid.width) for file in files)
    gaps = not (whole and same) or np.dtype(dtype).kind == "f"
    return RasterImage(paths, grid.height, grid.width, tuple(grid.transform)[:6], crs, np.dtype(dtype), bands, gaps)
