"""Labels as polygons over a scene."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import rasterio
from rasterio.features import rasterize
from rasterio.windows import Window

from pipeline.data.sources.custom.options import normalize_unicode, unique_class_names
from pipeline.data.sources.custom.rasters import RasterImage
from pipeline.errors import UserError
from pipeline.tasks import IGNORE

POLYGON_TYPES = ("Polygon", "MultiPolygon")
PARQUET_SUFFIXES = (".parquet", ".geoparquet")


@dataclass(frozen=True)
class PolygonLabels:
    """Draws the mask of a window of a scene; the smaller of two overlapping polygons counts.

    Attributes:
        path, layer, column: of the polygons and their classes; each process reads them once.
        crs: of the scene, as WKT.
        classes: names of the classes.
    """

    path: str
    crs: str
    column: str
    classes: tuple[str, ...]
    layer: str | None

    def __call__(self, image: RasterImage, window: Window) -> np.ndarray:
        """Draw the classes of a window's pixels, uint8 (y, x), with `IGNORE` outside all polygons."""
        geometry, class_index = _sorted_polygons(self)
        transform = rasterio.Affine(*image.window_transform(window.row_off, window.col_off))
        corners = [transform @ (column, row) for column in (0, window.width) for row in (0, window.height)]
        x, y = zip(*corners, strict=True)
        near = np.sort(geometry.sindex.intersection((min(x), min(y), max(x), max(y))))
        shapes = [(geometry.iloc[index], int(class_index[index])) for index in near]
        size = (window.height, window.width)
        if not shapes:
            return np.full(size, IGNORE, np.uint8)
        return rasterize(shapes, out_shape=size, transform=transform, fill=IGNORE, dtype="uint8")


def read_polygons(
    path: Path, image: RasterImage, column: str, classes: Sequence[str], layer: str = ""
) -> tuple[PolygonLabels, list[str]]:
    """Read and check polygons of any format that geopandas reads.

    Args:
        column: with the classes.
        classes: names of the classes; empty for all in the column.
        layer: of a file with several layers; optional if only one has geometries.

    Returns:
        The labels, and notes on polygons that are not used.

    Raises:
        UserError: no such layer or column, no CRS, no polygon of a class, too many classes, or no polygon within the
            scene.
    """
    try:
        layer_name = _choose_layer(path, layer)
        frame = _read_file(path, layer_name)
    except UserError:
        raise
    except Exception as error:  # each driver raises its own errors
        raise UserError(f"{path} cannot be read as polygons: {' '.join(str(error).split())}", path=path) from None
    _check_polygons(path, frame, column, image)
    frame[column] = _class_names(frame[column])
    listed = [normalize_unicode(name) for name in classes]
    present = sorted(frame[column].dropna().unique())
    present = present if listed else unique_class_names(present, f"The polygons of {path}")
    if missing := [name for name in listed if name not in present]:
        raise UserError(
            f"{path} has no polygon of {', '.join(missing)}. Its '{column}' has: {', '.join(present)}.",
            key="classes", value=missing, allowed=present, path=path,
        )  # fmt: skip
    _check_intersects(path, frame.to_crs(image.crs).total_bounds, image)
    class_names = listed or present
    if len(class_names) > IGNORE:
        raise UserError(
            f"{path} has {len(class_names)} classes in '{column}', such as {present[0]}; masks allow {IGNORE}. "
            "Name another label_column, or list the classes.",
            key="label_column", value=column, path=path,
        )  # fmt: skip
    notes = _unused_notes(frame, column, listed, present)
    return PolygonLabels(str(path), image.crs, column, tuple(class_names), layer_name), notes


def _check_polygons(path: Path, frame: pd.DataFrame, column: str, image: RasterImage) -> None:
    """Raise UserError for a file without polygons, without the column, or without a CRS."""
    if not isinstance(frame, geopandas.GeoDataFrame) or not frame.geom_type.isin(POLYGON_TYPES).any():
        raise UserError(
            f"{path} has no polygons. Labels of a scene are polygons, each with its class in a column.",
            key="labels", path=path,
        )  # fmt: skip
    if column not in frame:
        raise UserError(
            f"{path} has no column '{column}'. It has: {', '.join(map(str, frame.columns))}. "
            "Name the one with the classes as label_column.",
            key="label_column", value=column, allowed=map(str, frame.columns), path=path,
        )  # fmt: skip
    if frame.crs is None or not image.crs:
        file = path if frame.crs is None else image.paths[0]
        raise UserError(f"{file} states no coordinate reference system.", key="crs", path=file)


def _unused_notes(
    frame: geopandas.GeoDataFrame, column: str, listed: Sequence[str], present: Sequence[str]
) -> list[str]:
    """Describe the polygons that are not used, and those that are drawn twice."""
    notes = []
    is_polygon = frame.geom_type.isin(POLYGON_TYPES)
    if unlisted := [name for name in present if listed and name not in listed]:
        notes.append(f"polygons of {', '.join(unlisted)} are not used")
    if count := int((~is_polygon).sum()):
        notes.append(f"{count} of {len(frame)} features are not polygons, and are not used")
    if count := int(frame[column].isna().sum()):
        notes.append(f"{count} of {len(frame)} polygons have no class, and are not used")
    used = frame[frame[column].isin(listed or present) & is_polygon]
    if count := int((used.groupby(used.geometry.normalize().to_wkb())[column].nunique() > 1).sum()):
        notes.append(f"{count} polygons occur again with another class, and the last one counts")
    return notes


def _choose_layer(path: Path, layer: str) -> str | None:
    """Return the layer to read; None for a file without layers."""
    if path.suffix.lower() in PARQUET_SUFFIXES:
        return None
    layers = geopandas.list_layers(path)
    names = layers.name[layers.geometry_type.notna()].tolist()
    if layer and layer not in names:
        raise UserError(
            f"{path} has no layer '{layer}'. It has: {', '.join(names)}.",
            key="layer", value=layer, allowed=names, path=path,
        )  # fmt: skip
    if not layer and len(names) > 1:
        raise UserError(
            f"{path} has the layers {', '.join(names)}. Name one as layer in the options.",
            key="layer", value=layer, allowed=names, path=path,
        )  # fmt: skip
    return layer or (names[0] if names else None)


def _read_file(path: str | Path, layer: str | None) -> geopandas.GeoDataFrame:
    if Path(path).suffix.lower() in PARQUET_SUFFIXES:
        return geopandas.read_parquet(path)
    return geopandas.read_file(path, layer=layer)


def _check_intersects(path: Path, bounds: np.ndarray, image: RasterImage) -> None:
    """Raise UserError if the polygons' bounds, in the scene's CRS, and the scene's are disjoint."""
    (west, south, east, north), (left, low, right, high) = bounds, image.bounds
    if not (west < right and east > left and south < high and north > low):
        raise UserError(
            f"{path} does not intersect {image.paths[0]}: in the scene's coordinates the polygons lie between "
            f"({west:.8g}, {south:.8g}) and ({east:.8g}, {north:.8g}), the scene between ({left:.8g}, {low:.8g}) and "
            f"({right:.8g}, {high:.8g}). Are x and y swapped, or is a coordinate reference system wrong?",
            key="labels", value=tuple(map(float, bounds)), allowed=image.bounds, path=path,
        )  # fmt: skip


def _class_names(values: pd.Series) -> pd.Series:
    """Return names of classes as text; drivers read integers as 1.0 where some are missing."""
    if pd.api.types.is_float_dtype(values) and (values.dropna() % 1 == 0).all():
        values = values.astype("Int64")
    names = values.astype(object).where(values.notna())
    return names.map(lambda name: normalize_unicode(str(name)), na_action="ignore")


@functools.lru_cache(maxsize=4)
def _sorted_polygons(labels: PolygonLabels) -> tuple[geopandas.GeoSeries, np.ndarray]:
    """Read the used polygons in the scene's CRS, the largest first, and their class indices."""
    frame = _read_file(labels.path, labels.layer).to_crs(labels.crs)
    frame[labels.column] = _class_names(frame[labels.column])
    frame = frame[frame[labels.column].isin(labels.classes) & frame.geom_type.isin(POLYGON_TYPES)]
    frame = frame.iloc[np.argsort(-frame.area.to_numpy(), kind="stable")].reset_index(drop=True)
    return frame.geometry, frame[labels.column].map(labels.classes.index).to_numpy()
