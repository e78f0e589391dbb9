"""Labels of one's own as polygons over a scene."""

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

from pipeline.data.image_store import IGNORE
from pipeline.data.sources.custom.names import normalize_unicode, unique_class_names
from pipeline.data.sources.custom.rasters import RasterImage
from pipeline.errors import UserError

_AREAS = ("Polygon", "MultiPolygon")
_PARQUET = (".parquet", ".geoparquet")


@dataclass(frozen=True)
class PolygonLabels:
    """Labelled polygons in the CRS of a scene; where they overlap the smaller one counts, elsewhere is no label.

    Attributes:
        path, crs, column, classes, layer: where they are read from, once a process.
    """

    path: str
    crs: str
    column: str
    classes: tuple[str, ...]
    layer: str | None

    def __call__(self, picture: RasterImage, window: Window) -> np.ndarray:
        shapes, index = _polygons(self)
        transform = rasterio.Affine(*picture.window_transform(window.row_off, window.col_off))
        corners = [transform @ (column, row) for column in (0, window.width) for row in (0, window.height)]
        x, y = zip(*corners, strict=True)
        near = np.sort(shapes.sindex.intersection((min(x), min(y), max(x), max(y))))
        drawn = [(shapes.iloc[place], int(index[place])) for place in near]
        size = (window.height, window.width)
        if not drawn:
            return np.full(size, IGNORE, np.uint8)
        return rasterize(drawn, out_shape=size, transform=transform, fill=IGNORE, dtype="uint8")


def read_polygons(
    path: Path, picture: RasterImage, column: str, classes: Sequence[str], layer: str = ""
) -> tuple[PolygonLabels, list[str]]:
    """Polygons of any format that geopandas reads, and notes on those that are not used.

    Args:
        layer: of a file with several; it may be left out where there is one with geometries.

    Raises:
        UserError: no such layer or column, no CRS, no polygon of the classes, too many classes, or no polygon where
            the scene lies.
    """
    try:
        chosen = _layer(path, layer)
        frame = _read(path, chosen)
    except UserError:
        raise
    except Exception as error:  # the drivers raise their own
        raise UserError(f"{path} cannot be read as polygons: {' '.join(str(error).split())}") from None
    if not isinstance(frame, geopandas.GeoDataFrame) or not frame.geom_type.isin(_AREAS).any():
        raise UserError(f"{path} has no polygons; labels of a scene are polygons, each with its class in a column.")
    if column not in frame:
        raise UserError(
            f"{path} has no column '{column}'. It has: {', '.join(map(str, frame.columns))}. "
            "Name the one with the classes as label_column."
        )
    if frame.crs is None or not picture.crs:
        raise UserError(f"{path if frame.crs is None else picture.paths[0]} states no coordinate reference system.")
    frame[column], classes = _names(frame[column]), [normalize_unicode(name) for name in classes]
    found = sorted(frame[column].dropna().unique())
    found = found if classes else unique_class_names(found, f"The polygons of {path}")
    if gone := [name for name in classes if name not in found]:
        raise UserError(f"{path} has no polygon of {', '.join(gone)}. Its '{column}' has: {', '.join(found)}.")
    _meet(path, frame.to_crs(picture.crs).total_bounds, picture)
    if len(classes or found) > IGNORE:
        raise UserError(
            f"{path} has {len(classes or found)} classes in '{column}', such as {found[0]}; masks hold {IGNORE} at "
            "most. Name another label_column, or list the classes."
        )
    unused = [name for name in found if classes and name not in classes]
    notes = [f"polygons of {', '.join(unused)} are not used"] if unused else []
    if others := int((~frame.geom_type.isin(_AREAS)).sum()):
        notes.append(f"{others} of {len(frame)} features are no polygons, and are not used")
    if nameless := int(frame[column].isna().sum()):
        notes.append(f"{nameless} of {len(frame)} polygons have no class, and are not used")
    used = frame[frame[column].isin(classes or found) & frame.geom_type.isin(_AREAS)]
    if twice := int((used.groupby(used.geometry.normalize().to_wkb())[column].nunique() > 1).sum()):
        notes.append(f"{twice} polygons are there again with another class, and the later counts")
    return PolygonLabels(str(path), picture.crs, column, tuple(classes or found), chosen), notes


def _layer(path: Path, layer: str) -> str | None:
    """The layer to read; None of a file that has no layers."""
    if path.suffix.lower() in _PARQUET:
        return None
    layers = geopandas.list_layers(path)
    there = layers.name[layers.geometry_type.notna()].tolist()
    if layer and layer not in there:
        raise UserError(f"{path} has no layer '{layer}'. It has: {', '.join(there)}.")
    if not layer and len(there) > 1:
        raise UserError(f"{path} has the layers {', '.join(there)}. Name one as layer in the options.")
    return layer or (there[0] if there else None)


def _read(path: str | Path, layer: str | None) -> geopandas.GeoDataFrame:
    if Path(path).suffix.lower() in _PARQUET:
        return geopandas.read_parquet(path)
    return geopandas.read_file(path, layer=layer)


def _meet(path: Path, bounds: np.ndarray, picture: RasterImage) -> None:
    (west, south, east, north), (left, low, right, high) = bounds, picture.bounds
    if not (west < right and east > left and south < high and north > low):
        raise UserError(
            f"{path} does not meet {picture.paths[0]}: in the scene's coordinates the polygons lie between "
            f"({west:.8g}, {south:.8g}) and ({east:.8g}, {north:.8g}), the scene between ({left:.8g}, {low:.8g}) and "
            f"({right:.8g}, {high:.8g}). Are x and y swapped, or is one's coordinate reference system wrong?"
        )


def _names(values: pd.Series) -> pd.Series:
    """Names of classes, also of those that are numbers; drivers give whole ones as 1.0 where some are missing."""
    if pd.api.types.is_float_dtype(values) and (values.dropna() % 1 == 0).all():
        values = values.astype("Int64")
    return values.astype(object).where(values.notna()).map(lambda value: normalize_unicode(str(value)), na_action="ignore")


@functools.lru_cache(maxsize=4)
def _polygons(given: PolygonLabels):
    frame = _read(given.path, given.layer).to_crs(given.crs)
    frame[given.column] = _names(frame[given.column])
    frame = frame[frame[given.column].isin(given.classes) & frame.geom_type.isin(_AREAS)]
    frame = frame.iloc[np.argsort(-frame.area.to_numpy(), kind="stable")].reset_index(drop=True)
    return frame.geometry, frame[given.column].map(given.classes.index).to_numpy()
