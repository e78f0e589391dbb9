"""Labels of custom data: polygons over a scene, masks, or a CSV file.

Polygons are drawn onto the grid of the scene. Masks are rasters of class indices on the grid of the images. A CSV
file has one row per image.
"""

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import rasterio
from rasterio.crs import CRS
from rasterio.features import rasterize
from rasterio.windows import Window

from pipeline.data.image_store import parse_timestamp
from pipeline.data.sources.custom.options import normalize_unicode, unique_class_names
from pipeline.data.sources.custom.rasters import RasterImage, has_token, is_georeferenced, translate_rasterio_errors
from pipeline.errors import UserError
from pipeline.tasks import IGNORE

POLYGON_TYPES = ("Polygon", "MultiPolygon")
PARQUET_SUFFIXES = (".parquet", ".geoparquet")
LABEL_SEPARATOR = "|"


# Polygons


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


# Masks


@dataclass(frozen=True)
class MaskLabels:
    """Reads the mask of a window of an image.

    Attributes:
        paths: path of the mask by that of its image.
        classes: names of the classes, of the values 0, 1, ….
        ignore: value that does not count, or None.
    """

    paths: Mapping[str, str]
    classes: tuple[str, ...]
    ignore: int | None

    def __call__(self, image: RasterImage, window: Window) -> np.ndarray:
        """Read the classes of a window's pixels, uint8 (y, x) with `IGNORE`."""
        path = self.paths[image.paths[0]]
        with translate_rasterio_errors(path):
            file = _open(path)
            _check_same_grid(path, file, image)
            mask = file.read(1, window=window)
        # Fractions and NaN are not classes either; a cast would turn them into one.
        outside = ~np.isin(mask, np.arange(len(self.classes)))
        outside &= mask != self.ignore if self.ignore is not None else True
        if outside.any():
            raise UserError(
                f"{path} has the value {mask[outside][0]}; the classes are 0 to {len(self.classes) - 1}"
                f"{'' if self.ignore is None else f', and {self.ignore} is ignored'}.",
                key="classes", value=mask[outside][0], allowed=range(len(self.classes)), path=path,
            )  # fmt: skip
        return (mask if self.ignore is None else np.where(mask == self.ignore, IGNORE, mask)).astype(np.uint8)


def pair_masks(images: Sequence[Path], masks: Sequence[Path], skip_bad: bool, notes: list[str]) -> dict[str, str]:
    """Find the mask of each image: the file of the same name, or the one whose name contains the image's.

    Among several, as where folders repeat names, it is the one whose folder has the name of the image's folder.

    Args:
        skip_bad: skip images without a mask and add a note on each.

    Returns:
        Path of the mask by that of its image.

    Raises:
        UserError: an image without a mask, or with several, or a mask that fits several images.
    """
    image_of_mask: dict[Path, Path] = {}
    by_stem: dict[str, list[Path]] = {}
    for path in masks:
        by_stem.setdefault(path.stem, []).append(path)
    mask_folders = {path.parent for path in masks}
    # If some masks are in a folder named like an image's folder, masks in other folders belong to other images.
    best_common_parts = {
        folder: max(_common_trailing_parts(mask_folder, folder) for mask_folder in mask_folders)
        for folder in {image.parent for image in images}
    }
    for image in images:
        candidates = _masks_by_name(image, masks, by_stem)
        common_parts = [_common_trailing_parts(path.parent, image.parent) for path in candidates]
        best = max(common_parts, default=0)
        best = -1 if best_common_parts[image.parent] and not best else best
        candidates = [path for path, parts in zip(candidates, common_parts, strict=True) if parts == best]
        if not candidates and skip_bad:
            notes.append(f"skipped: {image} has no mask")
            continue
        if len(candidates) != 1:
            names = ", ".join(path.name for path in candidates[:4]) or "none"
            raise UserError(
                f"{image} has {len(candidates)} masks ({names}). A mask has the name of its image, or one that "
                "contains it.",
                key="labels", value=len(candidates), allowed=[1], path=image,
            )  # fmt: skip
        mask = candidates[0]
        if mask in image_of_mask:
            raise UserError(
                f"{mask} is the mask of both {image_of_mask[mask]} and {image}. A mask has the name of its image, or "
                "one that contains it, and where folders repeat names, a folder named like the image's.",
                key="labels", value=str(image), path=mask,
            )  # fmt: skip
        image_of_mask[mask] = image
    if not image_of_mask:
        raise UserError(
            f"None of {len(images)} images, such as {images[0]}, has a mask. A mask has the name of its image.",
            key="labels", path=images[0],
        )  # fmt: skip
    return {str(image): str(mask) for mask, image in image_of_mask.items()}


def _masks_by_name(image: Path, masks: Sequence[Path], by_stem: Mapping[str, list[Path]]) -> list[Path]:
    """Return the masks whose name equals or contains an image's name."""
    if image.stem in by_stem:
        return by_stem[image.stem]
    containing = [path for path in masks if image.stem in path.stem]
    # tile_1_mask and tile_10_mask both contain tile_1; only the first has it as a whole token.
    with_token = [path for path in containing if has_token(path.stem, image.stem)]
    return with_token or (containing if len(containing) == 1 else [])


def _common_trailing_parts(a: Path, b: Path) -> int:
    """Count the parts that two paths share at their ends."""
    count = 0
    while count < min(len(a.parts), len(b.parts)) and a.parts[-1 - count] == b.parts[-1 - count]:
        count += 1
    return count


def _check_same_grid(path: str, file: rasterio.DatasetReader, image: RasterImage) -> None:
    """Raise UserError if a mask is not on the grid of its image."""
    if file.count != 1:
        raise UserError(
            f"{path} has {file.count} bands; a mask has one, of class indices.",
            key="bands", value=file.count, allowed=[1], path=path,
        )  # fmt: skip
    if (file.height, file.width) != (image.height, image.width):
        raise UserError(
            f"{path} has {file.height} x {file.width} px, and its image has {image.height} x {image.width} px.",
            key="size", value=(file.height, file.width), allowed=[(image.height, image.width)], path=path,
        )  # fmt: skip
    if not is_georeferenced(file.transform, file.height) or not is_georeferenced(image.transform, image.height):
        return
    to_image = ~rasterio.Affine(*image.transform) @ file.transform
    corners = ((0, 0), (file.width, file.height))
    shift = max(np.abs(np.subtract(to_image @ corner, corner)).max() for corner in corners)
    if (file.crs and image.crs and file.crs != CRS.from_wkt(image.crs)) or shift > 0.5:
        raise UserError(f"{path} does not cover the same area as its image {image.paths[0]}.", key="crs", path=path)


@functools.lru_cache(maxsize=64)
def _open(path: str) -> rasterio.DatasetReader:
    return rasterio.open(path)


# CSV files


def read_table(
    path: Path,
    images: Sequence[Path],
    columns: Sequence[str],
    classes: Sequence[str],
    is_multilabel: bool,
    skip_bad: bool = False,
) -> pd.DataFrame:
    """Read a CSV file with the columns `file` and the label's, and, optionally, `split` and `time`.

    Args:
        images: all image files.
        columns: required columns; the first is `file`, the second that of the labels.
        classes: names of the classes; empty for those of the file.
        is_multilabel: labels are class names joined by `|`.
        skip_bad: skip rows without an image or a label.

    Returns:
        A row per image with path, label (class index, or list of zeros and ones), split and time. `attrs` has the
        classes, and notes on skipped rows.

    Raises:
        UserError: a column, file, time or class is missing or unknown, or a file is listed twice.
    """
    frame, column = _read_csv(path, columns), columns[1]
    images_by_name = _images_by_name(path, images)
    missing = [name for name in frame.file if _file_key(name) not in images_by_name]
    if missing and (not skip_bad or len(missing) == len(frame)):
        raise UserError(
            f"{path} lists '{missing[0]}', and there is no such image. There are {len(images)} images, such as "
            f"{images[0].name}.",
            key="file", value=missing[0], path=path,
        )  # fmt: skip
    notes = [f"skipped: {path} lists {name}, and there is no such image" for name in missing]
    is_empty = (frame[column] == "") & ~frame.file.isin(missing)
    unlabelled = [] if is_multilabel else frame.file[is_empty].tolist()
    if unlabelled and not skip_bad:
        raise UserError(f"{path}: {unlabelled[0]} has no label.", key=column, value=unlabelled[0], path=path)
    notes += [f"skipped: {path} has no label for {name}" for name in unlabelled]
    frame = frame[~frame.file.isin([*missing, *unlabelled])].reset_index(drop=True)
    if frame.empty:
        raise UserError(f"{path} has no row with an image and a label; {notes[0]}.", key=column, path=path)
    frame["path"] = _image_paths(path, frame.file, images_by_name)
    class_names = _add_labels(frame, path, column, classes, is_multilabel)
    if "time" in frame:
        for file, time in zip(frame.file, frame.time, strict=True):
            parse_timestamp(time, f"{path}: the time of {file}")
    frame.attrs["classes"] = tuple(class_names)
    frame.attrs["notes"] = notes
    return frame


def _add_labels(
    frame: pd.DataFrame, path: Path, column: str, classes: Sequence[str], is_multilabel: bool
) -> list[str]:
    """Add the column `label` and return the names of the classes."""
    labels = [
        [normalize_unicode(name) for name in (value.split(LABEL_SEPARATOR) if is_multilabel else [value])]
        for value in frame[column]
    ]
    used = {name for names in labels for name in names if name}
    class_names = [normalize_unicode(name) for name in classes] or unique_class_names(used, f"The labels of {path}")
    if unknown := used - set(class_names):
        raise UserError(
            f"{path} has the label '{min(unknown)}', and the classes are {', '.join(class_names)}.",
            key=column, value=min(unknown), allowed=class_names, path=path,
        )  # fmt: skip
    if is_multilabel:
        frame["label"] = [[int(name in names) for name in class_names] for names in labels]
    else:
        frame["label"] = [class_names.index(names[0]) for names in labels]
    return class_names


def _read_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read the table as text, without blanks around names and values."""
    try:
        with warnings.catch_warnings():
            # pandas truncates rows that are all longer than the header, with a warning only.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, skipinitialspace=True)
            # The header as written: pandas renames the second of two equal columns.
            header = pd.read_csv(path, dtype=str, header=None, nrows=1).iloc[0].astype(str).str.strip().tolist()
    except pd.errors.ParserWarning:
        raise UserError(
            f"{path} has rows with more values than columns. Join several labels of an image by {LABEL_SEPARATOR}.",
            path=path,
        ) from None
    except ValueError as error:  # also a parser error of pandas, or text that is not UTF-8
        raise UserError(
            f"{path} cannot be read as a table: {' '.join(str(error).split())}. Save it as CSV, in UTF-8.", path=path
        ) from None
    frame.columns = [str(name).strip() for name in frame.columns]
    for name in columns:
        if name not in frame:
            raise UserError(
                f"{path} has no column '{name}'. It has: {', '.join(frame.columns)}. It needs {', '.join(columns)}, "
                "separated by commas; label_column in params.yaml names the column of the labels.",
                key=name, allowed=frame.columns, path=path,
            )  # fmt: skip
        if header.count(name) > 1:
            raise UserError(f"{path} has two columns '{name}'. Remove one.", key=name, path=path)
    frame = frame.apply(lambda values: values.fillna("").str.strip())
    frame = frame[(frame != "").any(axis=1)].reset_index(drop=True)
    if frame.empty:
        raise UserError(f"{path} has no rows below its columns {', '.join(frame.columns)}.", path=path)
    return frame


def _file_key(name: str) -> str:
    """Write a file's name or path in one form."""
    return normalize_unicode(name).replace("\\", "/").removeprefix("./")


def _images_by_name(path: Path, images: Sequence[Path]) -> dict[str, set[Path]]:
    """Images by the names that a row may use: path, path relative to the table, file name, or stem."""
    by_name: dict[str, set[Path]] = {}
    for image in images:
        relative = {str(image.relative_to(path.parent))} if image.is_relative_to(path.parent) else set()
        for name in {str(image), image.name, image.stem, *relative}:
            by_name.setdefault(_file_key(name), set()).add(image)
    return by_name


def _image_paths(path: Path, names: pd.Series, images_by_name: dict[str, set[Path]]) -> list[str]:
    """Return the image of each row."""
    for name in names:
        matches = images_by_name[_file_key(name)]
        if len(matches) > 1:
            examples = ", ".join(map(str, sorted(matches)[:3]))
            raise UserError(
                f"{path} lists '{name}', and several images have that name: {examples}. List their paths.",
                key="file", value=name, allowed=sorted(map(str, matches)), path=path,
            )  # fmt: skip
    paths = [str(image) for name in names for image in images_by_name[_file_key(name)]]
    is_repeated = pd.Series(paths).duplicated()
    if is_repeated.any():
        name = names[is_repeated.to_numpy()].iloc[0]
        raise UserError(f"{path} lists {name} twice.", key="file", value=name, path=path)
    return paths
