"""Custom datasets from the land use scene: tiles with masks or a table, polygons, unlabelled images."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import rasterio
from rasterio import Affine

from pipeline.bands import Band
from pipeline.config import DatasetConfig, SplitFractions, parse
from pipeline.data.image_store import LazyImageDataset
from pipeline.data.sources import custom, osm_landuse, validate
from pipeline.data.sources.custom.options import CustomOptions

BANDS = [dataclasses.asdict(band) for band in osm_landuse.BANDS]
BLUE_GREEN_RED = BANDS[1:4]
BLUE = Band(**BLUE_GREEN_RED[0])
FRACTIONS = SplitFractions(0.6, 0.2, 0.2)
UTM = "EPSG:32633"
GRID = Affine(10, 0, 400000, 0, -10, 5800000)
NODATA = 65535


def scene_dataset(raw_folder, **changes) -> DatasetConfig:
    """The scene, with one file per band, and its polygons."""
    options = {
        "folder": str(raw_folder("osm_landuse")), "images": "*_B??.jp2", "labels": "*.gpkg",
        "label_column": "fclass", "units": "dn", "bands": BANDS, "display": [0, 0.3], "time": "2017-02-16T10:21:01",
    }  # fmt: skip
    options |= changes.pop("options", {})
    keys = {"task": "segmentation", "chip": 128, "block": 256, "splits": FRACTIONS} | changes
    return DatasetConfig("custom", **keys, options=options)


def tile_dataset(folder: Path, **changes) -> DatasetConfig:
    options = {
        "folder": str(folder), "images": "images/*.tif", "labels": "masks/*.tif", "units": "dn",
        "bands": BLUE_GREEN_RED, "classes": list(osm_landuse.CLASSES), "ignore": 255,
    }  # fmt: skip
    options |= changes.pop("options", {})
    keys = {"task": "segmentation", "chip": 64, "block": 256, "splits": FRACTIONS} | changes
    return DatasetConfig("custom", **keys, options=options)


def table_dataset(tiles: Path, folder: Path, columns=None, **changes) -> tuple[Path, DatasetConfig]:
    """Copy the tiles and write a table of labels farm and forest; return the folder and the dataset."""
    folder = folder / "table"
    shutil.copytree(tiles / "images", folder / "images")
    names = sorted(path.name for path in (folder / "images").iterdir())
    frame = pd.DataFrame({"file": names, "label": ["farm", "forest"] * (len(names) // 2)})
    frame.assign(**columns or {}).to_csv(folder / "labels.csv", index=False)
    options = {"folder": str(folder), "labels": "labels.csv", "classes": [], "ignore": None}
    options |= changes.pop("options", {})
    keys = {"task": "classification", "chip": 0, "block": 128} | changes
    return folder, tile_dataset(tiles, **keys, options=options)


def make_options(folder: Path, **options) -> CustomOptions:
    return parse(CustomOptions, tile_dataset(folder, options=options).options, "options")


def with_options(dataset: DatasetConfig, **options) -> DatasetConfig:
    return dataclasses.replace(dataset, options=dataset.options | options)


def prepare(dataset: DatasetConfig, tmp_path: Path) -> LazyImageDataset:
    """Validate and prepare a dataset as the stage does."""
    validate("x", dataset)
    return custom.prepare(tmp_path, dataset)


def write_raster(path: Path, values: np.ndarray, transform: Affine, crs: str | None = UTM, **profile) -> None:
    """Write values (band, y, x) as a GeoTIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = dict(zip(("count", "height", "width"), values.shape, strict=True)) | {"crs": crs} | profile
    with rasterio.open(path, "w", driver="GTiff", dtype=values.dtype, transform=transform, **keys) as file:
        file.write(values)


def rewrite_raster(path: Path, change: Callable = lambda values: values, **profile) -> None:
    """Write a raster again with changed values (band, y, x) or another profile."""
    with rasterio.open(path) as file:
        values, old_profile = change(file.read()), file.profile
    path.unlink()
    profile = {**old_profile, "dtype": values.dtype, "count": len(values), **profile}
    with rasterio.open(path, "w", **profile) as file:
        file.write(values)


def set_nodata(path: Path, rows: int, bands=slice(None), value=NODATA, dtype="uint16") -> None:
    """Set the first rows of some bands of a raster to nodata, and declare it, or to NaN."""

    def change(values):
        values = values.astype(dtype)
        values[bands, :rows] = value
        return values

    rewrite_raster(path, change, nodata=None if np.isnan(value) else value)


def counting_values(height: int, width: int, offset: int = 0) -> np.ndarray:
    """Values (1, y, x), uint16, that count pixels up to 1000."""
    return (np.arange(height * width, dtype="uint16").reshape(1, height, width) % 1000) + offset


def write_tile_pairs(folder: Path, transforms: Sequence[Affine], crs: str | None) -> dict:
    """Write an image and a mask of 64 px at each location; return options."""
    for index, transform in enumerate(transforms):
        values = counting_values(64, 64, index)
        write_raster(folder / f"images/t{index:02d}.tif", values, transform, crs)
        write_raster(folder / f"masks/t{index:02d}.tif", (values % 4).astype("uint8"), transform, crs)
    return {"folder": str(folder), "bands": BLUE_GREEN_RED[:1]}


def write_windows(raw_folder, folder, corners, name="unlabelled", masks="", bands=slice(1, 4), **profile) -> None:
    """Write windows of 128 px of the scene, at corners (row, column), and, if named, their masks."""
    scene, transform, crs = osm_landuse.read_scene(raw_folder("osm_landuse"))
    mask = osm_landuse.read_mask(raw_folder("osm_landuse"), transform, scene.shape[1:])[None] if masks else None
    for row, column in corners:
        area, window = np.s_[:, row : row + 128, column : column + 128], transform @ Affine.translation(column, row)
        file = f"tile_{row:04d}_{column:04d}"
        write_raster(folder / f"{name}/{file}.tif", scene[bands][area], window, **{"crs": crs} | profile)
        if masks:
            write_raster(folder / f"{masks}/{file}_mask.tif", mask[area], window, crs)
