"""Scenes from what a user has: a raster that names its bands, a Zarr store, or files that a YAML file describes.

A raster of any kind that GDAL reads must say itself what it holds: a description (common name) of every band, and
its units as the tag `units`. Where it does not, a YAML file beside it does, with the keys of the source `own`:

    images: "*_B??.jp2"           # one file, or a file a band; below the YAML file's folder
    units: dn                     # dn (reflectance x 10000), reflectance, uint8 or display
    bands:                        # in the file's order
      - {name: B04, common_name: red, wavelength: 0.665}
    nodata: 0                     # where the files do not say it themselves
    time: "2017-02-16T10:21:01"   # for models that are told it
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import rasterio
import xarray as xr
import yaml
from rasterio.errors import CRSError
from rasterio.windows import Window
from rioxarray.exceptions import RioXarrayError

from pipeline.bands import FULL_SCALE, Band
from pipeline.config import Float, parse
from pipeline.data.image_store import parse_timestamp
from pipeline.data.sources.custom import rasters, scenes
from pipeline.errors import UserError
from pipeline.mapping.scene import Scene


@dataclass(frozen=True)
class SceneConfig:
    """A scene as its YAML file describes it."""

    images: str
    units: str
    bands: tuple[Band, ...]
    folder: str = ""
    nodata: Float | None = None
    time: str = ""


def open_scene(path: Path) -> Scene:
    """The scene at a path.

    Raises:
        UserError: nothing there, or nothing that says what it holds.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no scene at {path}.")
    if path.suffix in (".yaml", ".yml"):
        try:
            told = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        described = parse(SceneConfig, told, path=path)
        found = scenes.find_files(path.parent / described.folder, described.images)
        return scene_from_rasters(found, described)
    if (path / "zarr.json").exists() or (path / ".zgroup").exists():
        return _from_zarr(path)
    return scene_from_rasters([path], _self_described(path))


def scene_from_rasters(paths: list[Path], described: SceneConfig) -> Scene:
    """One raster with all bands, or a file a band (found by the band's name in the file's)."""
    _check(described.units, str(paths[0]))
    picture = scenes.open_scene_files(paths, described.bands)

    def read(window, chosen):
        row, column, height, width = window
        values, valid = picture.read_bands(Window(column, row, width, height), chosen)
        if described.nodata is not None:
            valid &= (values != described.nodata).all(axis=0)
        return values, valid

    return Scene(
        str(paths[0]), picture.height, picture.width, picture.transform, picture.crs, described.bands,
        described.units, parse_timestamp(described.time, f"{paths[0]}: the time"),
        _state(map(Path, picture.paths), described), read,
    )  # fmt: skip


def _self_described(path: Path) -> SceneConfig:
    """What a raster says of itself.

    Raises:
        UserError: it does not; the message says how it, or a YAML file, would.
    """
    how = (
        "Describe it in a YAML file and give that as the scene (pipeline/mapping/open_scene.py shows one), or write a "
        "description of every band and the tag 'units' into the file."
    )
    with rasters.translate_errors(path), rasterio.open(path) as file:
        names, tags = file.descriptions, file.tags()
        units = tags.get("units") or next((one for one in file.units if one), "")
        waves = [file.tags(i, ns="IMAGERY").get("CENTRAL_WAVELENGTH_UM") for i in file.indexes]
    if not all(names):
        raise UserError(f"{path} does not say what its {len(names)} bands are. {how}")
    if not units:
        raise UserError(f"{path} does not say its units. {how}")
    bands = tuple(Band(name, name, float(wave or math.nan)) for name, wave in zip(names, waves, strict=True))
    return SceneConfig("", units, bands, time=tags.get("time", ""))


def _from_zarr(path: Path) -> Scene:
    """A variable (band, y, x) with a coordinate of the bands' common names, georeferenced as rioxarray does it."""
    opened = xr.open_zarr(path, chunks=None, decode_coords="all")
    fit = [name for name, one in opened.data_vars.items() if one.dims == ("band", "y", "x")]
    if len(fit) != 1 or "band" not in opened.coords:
        raise UserError(
            f"{path} must have one variable with the dimensions (band, y, x) and a coordinate 'band' of the bands' "
            f"names; it has: {', '.join(map(str, opened.variables))}."
        )
    array = opened[fit[0]]
    units = array.attrs.get("units", opened.attrs.get("units", ""))
    _check(units, str(path))
    waves = opened.wavelength.values if "wavelength" in opened.coords else np.full(array.sizes["band"], np.nan)
    names = map(str, array.band.values)
    bands = tuple(Band(name, name, float(wave)) for name, wave in zip(names, waves, strict=True))
    try:
        crs, transform = array.rio.crs, tuple(array.rio.transform())[:6]
    except (RioXarrayError, CRSError) as error:
        raise UserError(f"{path} does not say properly where it lies: {error}") from None
    described = SceneConfig(fit[0], units, bands, time=str(opened.attrs.get("time", "")))

    def read(window, chosen):
        row, column, height, width = window
        some = array[list(chosen), row : row + height, column : column + width].values
        return some, rasters.isfinite_mask(some)

    return Scene(
        str(path), array.sizes["y"], array.sizes["x"], transform,
        crs.to_wkt() if crs else "", bands, units, parse_timestamp(described.time, f"{path}: the time"),
        _state(path.rglob("*"), described), read,
    )  # fmt: skip


def _check(units: str, where: str) -> None:
    if units not in FULL_SCALE:
        raise UserError(f"{where}: units '{units}' are not known. Known units: {', '.join(FULL_SCALE)}.")


def _state(paths, described: SceneConfig) -> str:
    """Files with their sizes and times of change, and how they are described."""
    files = sorted(path.resolve() for path in paths if path.is_file())
    return json.dumps([*[(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
                       asdict(described)])  # fmt: skip
