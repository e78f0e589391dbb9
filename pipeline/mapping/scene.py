"""Open a scene, and match its bands, units and pixel size to a model.

A scene is a raster that names its bands, a Zarr store, or files that a YAML file describes.

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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import xarray as xr
from pyproj import Geod
from rasterio.errors import CRSError
from rasterio.windows import Window
from rioxarray.exceptions import RioXarrayError

from cache.checksums import fingerprint
from pipeline import config
from pipeline.bands import FULL_SCALE, WAVELENGTH_TOLERANCE_UM, Band, band_index
from pipeline.data.image_store import parse_timestamp
from pipeline.data.sources.custom import rasters
from pipeline.data.splits import to_latlon
from pipeline.errors import UserError
from pipeline.mapping.predictors import Signature

# Models are trained on one pixel size. Scenes whose pixels are larger or smaller by this factor are refused.
MAX_GSD_RATIO = 1.5
DESCRIBE_HINT = (
    "Describe it in a YAML file and map that file (pipeline/mapping/scene.py shows an example), or write a "
    "description of every band and the tag 'units' into the raster."
)

ReadWindow = Callable[[Window, Sequence[int]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class SceneConfig:
    """The keys of a YAML file that describes a scene."""

    images: str
    units: str
    bands: tuple[Band, ...]
    folder: str = ""
    nodata: config.Float | None = None
    time: str = ""


@dataclass(frozen=True)
class Scene:
    """One image of any size.

    Attributes:
        transform: affine coefficients a to f, from (column, row) to the CRS; the identity without georeference.
        crs: coordinate reference system as WKT; empty without georeference.
        time: acquisition time, UTC; NaT if unknown.
        fingerprint: changes with its files and its description.
        read_window: a function from a window and band indices to pixels (band, y, x) of any dtype, and where (y, x)
            all of these bands have data.
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
    read_window: ReadWindow

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


def open_scene(path: Path) -> Scene:
    """Open the raster, Zarr store or YAML file at a path; refuse one without bands or units."""
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
    image = rasters.open_image(paths, scene_config.bands)

    def read_window(window, band_indices):
        values, is_valid = image.read(window, bands=band_indices)
        if scene_config.nodata is not None:
            is_valid &= (values != scene_config.nodata).all(axis=0)
        return values, is_valid

    return _make_scene(
        paths[0], map(Path, image.paths), scene_config, read_window, height=image.height, width=image.width,
        transform=tuple(image.transform)[:6], crs=image.crs,
    )  # fmt: skip


def _self_described(path: Path) -> SceneConfig:
    """Read bands, units and time from the descriptions and tags of a raster."""
    with rasters.translate_rasterio_errors(path), rasterio.open(path) as file:
        names, tags = file.descriptions, file.tags()
        units = tags.get("units") or next((band_units for band_units in file.units if band_units), "")
        wavelengths = [file.tags(i, ns="IMAGERY").get("CENTRAL_WAVELENGTH_UM") for i in file.indexes]
    if not all(names):
        problem = f"{path} does not name all of its {len(names)} bands. {DESCRIBE_HINT}"
        raise UserError(problem, key="bands", value=names, path=path)
    if not units:
        raise UserError(
            f"{path} does not state its units. {DESCRIBE_HINT}", key="units", allowed=FULL_SCALE, path=path
        )
    return SceneConfig("", units, _bands(names, wavelengths), time=tags.get("time", ""))


def _scene_from_zarr(path: Path) -> Scene:
    """Open a variable (band, y, x) with common names as coordinate `band` and rioxarray's georeference."""
    store = xr.open_zarr(path, chunks=None, decode_coords="all")
    candidates = [name for name, variable in store.data_vars.items() if variable.dims == ("band", "y", "x")]
    if len(candidates) != 1 or "band" not in store.coords:
        present = [str(name) for name in store.variables]
        raise UserError(
            f"{path} must have one variable with the dimensions (band, y, x) and a coordinate 'band' with the names "
            f"of the bands. It has: {', '.join(present)}.",
            key="band", value=candidates, allowed=present, path=path,
        )  # fmt: skip
    array = store[candidates[0]]
    units = array.attrs.get("units", store.attrs.get("units", ""))
    wavelengths = store.wavelength.values if "wavelength" in store.coords else [None] * array.sizes["band"]
    bands = _bands(list(map(str, array.band.values)), wavelengths)
    scene_config = SceneConfig(candidates[0], units, bands, time=str(store.attrs.get("time", "")))
    try:
        crs, transform = array.rio.crs, tuple(array.rio.transform())[:6]
    except (RioXarrayError, CRSError) as error:
        problem = f"{path} has an invalid georeference: {error}. Write it with rioxarray."
        raise UserError(problem, key="crs", path=path) from None

    def read_window(window, band_indices):
        rows, columns = window.toslices()
        values = array[list(band_indices), rows, columns].values
        return values, rasters.isfinite_mask(values)

    return _make_scene(
        path, path.rglob("*"), scene_config, read_window, height=array.sizes["y"], width=array.sizes["x"],
        transform=transform, crs=crs.to_wkt() if crs else "",
    )  # fmt: skip


def _bands(names: Sequence[str], wavelengths: Sequence) -> tuple[Band, ...]:
    pairs = zip(names, wavelengths, strict=True)
    return tuple(Band(name, name, float(wavelength or math.nan)) for name, wavelength in pairs)


def _make_scene(
    path: Path, files: Iterable[Path], scene_config: SceneConfig, read_window: ReadWindow, **grid
) -> Scene:
    """Check units and time; the fingerprint is of the description and the files' names, sizes and times."""
    units, files = scene_config.units, sorted(file.resolve() for file in files if file.is_file())
    if units not in FULL_SCALE:
        problem = f"{path}: the units '{units}' are unknown. Use one of: {', '.join(FULL_SCALE)}."
        raise UserError(problem, key="units", value=units, allowed=FULL_SCALE, path=path)
    time = parse_timestamp(scene_config.time, f"{path}: the time")
    digest = fingerprint([(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files], scene_config)
    return Scene(
        name=str(path), bands=scene_config.bands, units=units, time=time, fingerprint=digest, read_window=read_window,
        **grid,
    )  # fmt: skip


def match_scene(scene: Scene, signature: Signature) -> list[int]:
    """Find the indices of a model's bands in a scene by name; refuse a scene that does not fit the model."""
    if "location" in signature.metadata_keys and not scene.crs:
        raise UserError(
            f"The model takes latitude and longitude as inputs, and {scene.name} has no coordinate reference system.",
            key="crs", path=scene.name,
        )  # fmt: skip
    if "time" in signature.metadata_keys and np.isnat(scene.time):
        raise UserError(
            f"The model takes the acquisition time as input, and {scene.name} has none. Describe the scene in a YAML "
            "file with its time.",
            key="time", path=scene.name,
        )  # fmt: skip
    indices = [_find_band(band, scene.bands) for band in signature.bands]
    missing = [band.common_name for band, index in zip(signature.bands, indices, strict=True) if index is None]
    if missing:
        present = [
            f"{band.common_name} ({band.wavelength} µm)" if band.is_optical else band.common_name
            for band in scene.bands
        ]
        raise UserError(
            f"{scene.name} lacks the bands {', '.join(missing)}, which the model needs. It has {', '.join(present)}. "
            "Bands are matched by common name, and by wavelength where it is stated.",
            key="bands", value=missing, allowed=present, path=scene.name,
        )  # fmt: skip
    if scene.units != signature.units:
        raise UserError(
            f"{scene.name} is in '{scene.units}', and the model was trained on '{signature.units}'. Convert the "
            "scene, or correct its units if they are stated wrong.",
            key="units", value=scene.units, allowed=[signature.units], path=scene.name,
        )  # fmt: skip
    ratio = scene.gsd / signature.gsd
    if not math.isnan(ratio) and not 1 / MAX_GSD_RATIO < ratio < MAX_GSD_RATIO:
        raise UserError(
            f"{scene.name} has pixels of {scene.gsd:.3g} m, and the model was trained on {signature.gsd:.3g} m. "
            "Resample the scene first, for instance with gdalwarp -tr.",
            key="gsd", value=scene.gsd, allowed=[signature.gsd], path=scene.name,
        )  # fmt: skip
    return [index for index in indices if index is not None]


def _find_band(band: Band, scene_bands: Sequence[Band]) -> int | None:
    index = band_index(band.common_name, scene_bands)
    index = band_index(band.name, scene_bands) if index is None else index
    if index is None:
        return None
    difference = abs(scene_bands[index].wavelength - band.wavelength)
    return None if difference > WAVELENGTH_TOLERANCE_UM else index
