"""Open a scene: a raster that names its bands, a Zarr store, or files that a YAML file describes.

A raster of any format that GDAL reads must contain a description (common name) of every band, and its units as the
tag `units`. Otherwise write a YAML file with the keys of the source `custom`, and open that instead:

    images: "*_B??.jp2"           # one file, or one file per band; relative to the folder of the YAML file
    units: dn                     # dn (reflectance x 10000), reflectance, uint8 or display
    bands:                        # in the order of the file
      - {name: B04, common_name: red, wavelength: 0.665}
    nodata: 0                     # if the files do not state it
    time: "2017-02-16T10:21:01"   # for models that take the acquisition time as input
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import xarray as xr
from rasterio.errors import CRSError
from rasterio.windows import Window
from rioxarray.exceptions import RioXarrayError

from cache.checksums import fingerprint
from pipeline import config
from pipeline.bands import FULL_SCALE, Band
from pipeline.data.image_store import parse_timestamp
from pipeline.data.sources.custom import rasters
from pipeline.errors import UserError
from pipeline.mapping.scene import Scene

DESCRIBE_HINT = (
    "Describe it in a YAML file and map that file (pipeline/mapping/open_scene.py shows an example), or write a "
    "description of every band and the tag 'units' into the raster."
)


@dataclass(frozen=True)
class SceneConfig:
    """The keys of a YAML file that describes a scene."""

    images: str
    units: str
    bands: tuple[Band, ...]
    folder: str = ""
    nodata: config.Float | None = None
    time: str = ""


def open_scene(path: Path) -> Scene:
    """Open the raster, Zarr store or YAML file at a path.

    Raises:
        UserError: the path does not exist, cannot be read, or does not describe its bands and units.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no scene at {path}. Check the path.", path=path)
    if path.suffix in (".yaml", ".yml"):
        scene_config = config.parse(SceneConfig, config.read_yaml(path), path=path)
        files = rasters.find_files(path.parent / scene_config.folder, scene_config.images)
        return scene_from_rasters(files, scene_config)
    if (path / "zarr.json").exists() or (path / ".zgroup").exists():
        return _scene_from_zarr(path)
    return scene_from_rasters([path], _self_described(path))


def scene_from_rasters(paths: list[Path], scene_config: SceneConfig) -> Scene:
    """Open one raster with all bands, or one raster per band, with the name of the band in its file name."""
    _check_units(scene_config.units, paths[0])
    image = rasters.open_scene_files(paths, scene_config.bands)

    def read_window(window, band_indices):
        row, column, height, width = window
        values, is_valid = image.read_bands(Window(column, row, width, height), band_indices)
        if scene_config.nodata is not None:
            is_valid &= (values != scene_config.nodata).all(axis=0)
        return values, is_valid

    return Scene(
        name=str(paths[0]),
        height=image.height,
        width=image.width,
        transform=image.transform,
        crs=image.crs,
        bands=scene_config.bands,
        units=scene_config.units,
        time=parse_timestamp(scene_config.time, f"{paths[0]}: the time"),
        fingerprint=_scene_fingerprint(map(Path, image.paths), scene_config),
        read_window=read_window,
    )


def _self_described(path: Path) -> SceneConfig:
    """Read bands, units and time from the descriptions and tags of a raster.

    Raises:
        UserError: it does not contain them.
    """
    with rasters.translate_rasterio_errors(path), rasterio.open(path) as file:
        names, tags = file.descriptions, file.tags()
        units = tags.get("units") or next((band_units for band_units in file.units if band_units), "")
        wavelengths = [file.tags(i, ns="IMAGERY").get("CENTRAL_WAVELENGTH_UM") for i in file.indexes]
    if not all(names):
        raise UserError(
            f"{path} does not name all of its {len(names)} bands. {DESCRIBE_HINT}",
            key="bands",
            value=names,
            path=path,
        )
    if not units:
        raise UserError(
            f"{path} does not state its units. {DESCRIBE_HINT}", key="units", allowed=FULL_SCALE, path=path
        )
    bands = tuple(
        Band(name, name, float(wavelength or math.nan)) for name, wavelength in zip(names, wavelengths, strict=True)
    )
    return SceneConfig("", units, bands, time=tags.get("time", ""))


def _scene_from_zarr(path: Path) -> Scene:
    """Open a variable (band, y, x) with common names as coordinate `band` and rioxarray's georeference."""
    store = xr.open_zarr(path, chunks=None, decode_coords="all")
    candidates = [name for name, variable in store.data_vars.items() if variable.dims == ("band", "y", "x")]
    if len(candidates) != 1 or "band" not in store.coords:
        present = [str(name) for name in store.variables]
        raise UserError(
            f"{path} must have one variable with the dimensions (band, y, x) and a coordinate 'band' with the names "
            f"of the bands. It has: {', '.join(present)}.",
            key="band",
            value=candidates,
            allowed=present,
            path=path,
        )
    array = store[candidates[0]]
    units = array.attrs.get("units", store.attrs.get("units", ""))
    _check_units(units, path)
    no_wavelengths = np.full(array.sizes["band"], np.nan)
    wavelengths = store.wavelength.values if "wavelength" in store.coords else no_wavelengths
    names = map(str, array.band.values)
    bands = tuple(Band(name, name, float(wavelength)) for name, wavelength in zip(names, wavelengths, strict=True))
    try:
        crs, transform = array.rio.crs, tuple(array.rio.transform())[:6]
    except (RioXarrayError, CRSError) as error:
        raise UserError(
            f"{path} has an invalid georeference: {error}. Write it with rioxarray.", key="crs", path=path
        ) from None
    scene_config = SceneConfig(candidates[0], units, bands, time=str(store.attrs.get("time", "")))

    def read_window(window, band_indices):
        row, column, height, width = window
        values = array[list(band_indices), row : row + height, column : column + width].values
        return values, rasters.isfinite_mask(values)

    return Scene(
        name=str(path),
        height=array.sizes["y"],
        width=array.sizes["x"],
        transform=transform,
        crs=crs.to_wkt() if crs else "",
        bands=bands,
        units=units,
        time=parse_timestamp(scene_config.time, f"{path}: the time"),
        fingerprint=_scene_fingerprint(path.rglob("*"), scene_config),
        read_window=read_window,
    )


def _check_units(units: str, path: Path) -> None:
    if units not in FULL_SCALE:
        raise UserError(
            f"{path}: the units '{units}' are unknown. Use one of: {', '.join(FULL_SCALE)}.",
            key="units",
            value=units,
            allowed=FULL_SCALE,
            path=path,
        )


def _scene_fingerprint(paths: Iterable[Path], scene_config: SceneConfig) -> str:
    """Fingerprint of the files' names, sizes and modification times, and of the description."""
    files = sorted(path.resolve() for path in paths if path.is_file())
    return fingerprint([(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files], scene_config)
