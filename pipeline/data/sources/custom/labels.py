"""Labels of custom data: polygons over a scene, masks, or a CSV file.

Polygons are drawn onto the grid of the scene. Masks are rasters of class indices on the grid of the images. A CSV
file has one row per image.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import rasterio
from rasterio.crs import CRS
from rasterio.features import rasterize
from rasterio.windows import Window

from pipeline.data.image_store import parse_timestamp
from pipeline.data.sources.custom import rasters
from pipeline.data.sources.custom.options import CustomOptions, normalize_unicode, unique_class_names
from pipeline.data.sources.custom.rasters import RasterImage
from pipeline.errors import UserError
from pipeline.tasks import IGNORE

POLYGON_TYPES = ("Polygon", "MultiPolygon")
PARQUET_SUFFIXES = (".parquet", ".geoparquet")
LABEL_SEPARATOR = "|"
# Function from an image and a window of it to the classes of the pixels, uint8 (y, x) with `IGNORE`.
ReadMask = Callable[[RasterImage, Window], np.ndarray]


# Polygons


def read_polygons(
    path: Path, image: RasterImage, options: CustomOptions, notes: list[str]
) -> tuple[ReadMask, tuple[str, ...]]:
    """Read polygons of any format that geopandas reads; add notes on those that are not used.

    Returns a function that draws them, and the classes. Raises UserError for a missing layer, column, CRS or class,
    for too many classes, or if no polygon is within the scene.
    """
    column = options.label_column
    frame = _read_frame(path, options.layer)
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
    frame = frame.to_crs(image.crs)
    _check_intersects(path, frame.total_bounds, image)
    class_name = _class_names(frame[column])
    present = sorted(class_name.dropna().unique())
    classes = [normalize_unicode(name) for name in options.classes]
    classes = classes or unique_class_names(present, f"The polygons of {path}")
    if missing := [name for name in classes if name not in present]:
        raise UserError(
            f"{path} has no polygon of {', '.join(missing)}. Its '{column}' has: {', '.join(present)}.",
            key="classes", value=missing, allowed=present, path=path,
        )  # fmt: skip
    if len(classes) > IGNORE:
        raise UserError(
            f"{path} has {len(classes)} classes in '{column}', such as {present[0]}; masks allow {IGNORE}. "
            "Name another label_column, or list the classes.",
            key="label_column", value=column, path=path,
        )  # fmt: skip
    is_polygon = frame.geom_type.isin(POLYGON_TYPES)
    if unlisted := [name for name in present if name not in classes]:
        notes.append(f"polygons of {', '.join(unlisted)} are not used")
    reasons = {"features are not polygons": ~is_polygon, "polygons have no class": class_name.isna()}
    for problem, is_skipped in reasons.items():
        if is_skipped.any():
            notes.append(f"{is_skipped.sum()} of {len(frame)} {problem}, and are not used")
    is_used = class_name.isin(classes) & is_polygon
    geometry, class_name = frame.geometry[is_used], class_name[is_used]
    if count := int((class_name.groupby(geometry.normalize().to_wkb()).nunique() > 1).sum()):
        notes.append(f"{count} polygons occur again with another class, and the last one counts")
    notes.append("where polygons overlap the smaller one counts; outside all polygons there is no label")
    order = np.argsort(-geometry.area.to_numpy(), kind="stable")
    class_index = class_name.map(classes.index).to_numpy()
    geometry = geometry.iloc[order].reset_index(drop=True)
    return functools.partial(_draw_polygons, geometry, class_index[order]), tuple(classes)


def _draw_polygons(
    geometry: geopandas.GeoSeries, class_index: np.ndarray, image: RasterImage, window: Window
) -> np.ndarray:
    """Draw the classes of a window's pixels; a later polygon counts, and `IGNORE` outside all of them."""
    transform = image.transform @ rasterio.Affine.translation(window.col_off, window.row_off)
    x, y = rasters.corners(transform, window.height, window.width)
    near = np.sort(geometry.sindex.intersection((min(x), min(y), max(x), max(y))))
    size = (window.height, window.width)
    if not len(near):
        return np.full(size, IGNORE, np.uint8)
    shapes = zip(geometry.iloc[near], class_index[near].tolist(), strict=True)
    return rasterize(shapes, out_shape=size, transform=transform, fill=IGNORE, dtype="uint8")


def _read_frame(path: Path, layer: str) -> pd.DataFrame:
    """Read a layer of a file; its only one if none is named."""
    try:
        if path.suffix.lower() in PARQUET_SUFFIXES:
            return geopandas.read_parquet(path)
        layers = geopandas.list_layers(path)
        names = layers.name[layers.geometry_type.notna()].tolist()
        if (layer and layer not in names) or (not layer and len(names) > 1):
            raise UserError(
                f"{path} has the layers {', '.join(names)}, and layer is '{layer}'. Name one of them in the options.",
                key="layer", value=layer, allowed=names, path=path,
            )  # fmt: skip
        return geopandas.read_file(path, layer=layer or (names[0] if names else None))
    except UserError:
        raise
    except Exception as error:  # each driver raises its own errors
        raise UserError(f"{path} cannot be read as polygons: {' '.join(str(error).split())}", path=path) from None


def _check_intersects(path: Path, bounds: np.ndarray, image: RasterImage) -> None:
    """Refuse polygons whose bounds, in the scene's CRS, and the scene's are disjoint."""
    x, y = rasters.corners(image.transform, image.height, image.width)
    (west, south, east, north), (left, low, right, high) = bounds, (min(x), min(y), max(x), max(y))
    if not (west < right and east > left and south < high and north > low):
        raise UserError(
            f"{path} does not intersect {image.paths[0]}: in the scene's coordinates the polygons lie between "
            f"({west:.8g}, {south:.8g}) and ({east:.8g}, {north:.8g}), the scene between ({left:.8g}, {low:.8g}) and "
            f"({right:.8g}, {high:.8g}). Are x and y swapped, or is a coordinate reference system wrong?",
            key="labels", value=tuple(map(float, bounds)), allowed=(left, low, right, high), path=path,
        )  # fmt: skip


def _class_names(values: pd.Series) -> pd.Series:
    """Return names of classes as text; drivers read integers as 1.0 where some are missing."""
    if pd.api.types.is_float_dtype(values) and (values.dropna() % 1 == 0).all():
        values = values.astype("Int64")
    names = values.astype(object).where(values.notna())
    return names.map(lambda name: normalize_unicode(str(name)), na_action="ignore")


# Masks


def read_mask(
    mask_of_image: Mapping[str, str], n_classes: int, ignore: int | None, image: RasterImage, window: Window
) -> np.ndarray:
    """Read the classes of a window's pixels, uint8 (y, x) with `IGNORE`, from the mask of an image.

    Raises UserError for a damaged mask, another grid than the image's, or a value that is not a class or `ignore`.
    """
    path = mask_of_image[image.paths[0]]
    with rasters.translate_rasterio_errors(path):
        file = _open(path)
        _check_same_grid(path, file, image)
        mask = file.read(1, window=window)
    ignored = np.zeros(mask.shape, bool) if ignore is None else mask == ignore
    # Fractions and NaN are not classes either; a cast would turn them into one.
    outside = ~np.isin(mask, np.arange(n_classes)) & ~ignored
    if outside.any():
        raise UserError(
            f"{path} has the value {mask[outside][0]}; the classes are 0 to {n_classes - 1}"
            f"{'' if ignore is None else f', and {ignore} is ignored'}.",
            key="classes", value=mask[outside][0], allowed=range(n_classes), path=path,
        )  # fmt: skip
    return np.where(ignored, IGNORE, mask).astype(np.uint8)


def pair_masks(images: Sequence[Path], masks: Sequence[Path], skip_bad: bool, notes: list[str]) -> dict[str, str]:
    """Find the mask of each image: the file of the same name, or the one whose name contains the image's.

    Among several, as where folders repeat names, it is the one whose folder has the name of the image's folder. If
    some folder of masks has that name, masks in other folders belong to other images. With `skip_bad`, an image
    without a mask is skipped and noted.

    Returns the path of the mask by that of its image. Raises UserError for an image without a mask, or with several,
    or a mask that fits several images.
    """
    rule = "A mask has the name of its image, or one that contains it"
    image_of_mask: dict[Path, Path] = {}
    by_stem: dict[str, list[Path]] = {}
    for path in masks:
        by_stem.setdefault(path.stem, []).append(path)
    folders = {path.parent for path in masks}
    common_parts = functools.cache(_common_trailing_parts)
    for image in images:
        parts_of_folder = {folder: common_parts(folder, image.parent) for folder in folders}
        candidates = by_stem.get(image.stem) or _masks_with_name(image, masks)
        best = max((parts_of_folder[path.parent] for path in candidates), default=0)
        if best == 0 and any(parts_of_folder.values()):
            candidates = []
        candidates = [path for path in candidates if parts_of_folder[path.parent] == best]
        if not candidates and skip_bad:
            notes.append(f"skipped: {image} has no mask")
            continue
        if len(candidates) != 1:
            names = ", ".join(path.name for path in candidates[:4]) or "none"
            raise UserError(
                f"{image} has {len(candidates)} masks ({names}). {rule}.",
                key="labels", value=len(candidates), allowed=[1], path=image,
            )  # fmt: skip
        other = image_of_mask.setdefault(candidates[0], image)
        if other != image:
            raise UserError(
                f"{candidates[0]} is the mask of both {other} and {image}. {rule}, and where folders repeat names, a "
                "folder named like the image's.",
                key="labels", value=str(image), path=candidates[0],
            )  # fmt: skip
    if not image_of_mask:
        raise UserError(
            f"None of {len(images)} images, such as {images[0]}, has a mask. {rule}.", key="labels", path=images[0]
        )
    return {str(image): str(mask) for mask, image in image_of_mask.items()}


def _masks_with_name(image: Path, masks: Sequence[Path]) -> list[Path]:
    """Return the masks whose name contains an image's name, as a whole token if there is such a mask."""
    containing = [path for path in masks if image.stem in path.stem]
    # tile_1_mask and tile_10_mask both contain tile_1; only the first has it as a whole token.
    with_token = [path for path in containing if rasters.has_token(path.stem, image.stem)]
    return with_token or (containing if len(containing) == 1 else [])


def _common_trailing_parts(a: Path, b: Path) -> int:
    """Count the parts that two paths share at their ends."""
    pairs = zip(reversed(a.parts), reversed(b.parts), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _check_same_grid(path: str, file: rasterio.DatasetReader, image: RasterImage) -> None:
    """Refuse a mask that is not on the grid of its image."""
    if file.count != 1:
        raise UserError(
            f"{path} has {file.count} bands; a mask has one, of class indices.",
            key="bands", value=file.count, allowed=[1], path=path,
        )  # fmt: skip
    size, expected = (file.height, file.width), (image.height, image.width)
    if size != expected:
        raise UserError(
            f"{path} has {size[0]} x {size[1]} px, and its image has {expected[0]} x {expected[1]} px.",
            key="size", value=size, allowed=[expected], path=path,
        )  # fmt: skip
    if not (rasters.is_georeferenced(file) and rasters.is_georeferenced(image)):
        return
    file_corners = rasters.corners(~image.transform @ file.transform, *size)
    shift = np.abs(np.subtract(file_corners, rasters.corners(rasterio.Affine.identity(), *size))).max()
    if (file.crs and image.crs and file.crs != CRS.from_wkt(image.crs)) or shift > 0.5:
        raise UserError(f"{path} does not cover the same area as its image {image.paths[0]}.", key="crs", path=path)


@functools.lru_cache(maxsize=64)
def _open(path: str) -> rasterio.DatasetReader:
    return rasterio.open(path)


# CSV files


def read_table(
    path: Path, images: Sequence[Path], options: CustomOptions, is_multilabel: bool, notes: list[str]
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Read a CSV file with the columns `file` and the label's, and, optionally, `split` and `time`.

    Args:
        images: all image files.
        is_multilabel: labels are class names joined by `|`.

    Returns the rows, with `path` and `label` (class index, or zeros and ones), and the classes. Raises UserError for
    a missing or unknown column, file, time or class, and for a file listed twice.
    """
    column = options.label_column
    frame = _read_csv(path, ("file", column, *(("split",) if options.split == "column" else ())))
    images_by_name = _images_by_name(path, images)
    is_missing = ~frame.file.map(_file_key).isin(images_by_name)
    is_unlabelled = (frame[column] == "") & ~is_missing & (not is_multilabel)
    is_bad = is_missing | is_unlabelled
    missing_reason = f"there is no such image among {len(images)}, such as {images[0].name}"
    for is_skipped, key, reason in ((is_missing, "file", missing_reason), (is_unlabelled, column, "it has no label")):
        names = frame.file[is_skipped].tolist()
        if names and (not options.skip_bad or is_bad.all()):
            raise UserError(f"{path} lists '{names[0]}', and {reason}.", key=key, value=names[0], path=path)
        notes += [f"skipped: {path} lists {name}, and {reason}" for name in names]
    frame = frame[~is_bad].reset_index(drop=True)
    frame["path"] = _image_paths(path, frame.file, images_by_name)
    frame["label"], classes = _labels(path, frame[column], options.classes, is_multilabel)
    for file, time in zip(frame.file, frame.get("time", [""] * len(frame)), strict=True):
        parse_timestamp(time, f"{path}: the time of {file}")
    return frame, tuple(classes)


def _labels(
    path: Path, values: pd.Series, listed: Sequence[str], is_multilabel: bool
) -> tuple[list[int] | list[list[int]], list[str]]:
    """Return the label of each row, and the names of the classes."""
    labels = [
        [normalize_unicode(name) for name in (value.split(LABEL_SEPARATOR) if is_multilabel else [value])]
        for value in values
    ]
    used = {name for names in labels for name in names if name}
    classes = [normalize_unicode(name) for name in listed] or unique_class_names(used, f"The labels of {path}")
    if unknown := used - set(classes):
        raise UserError(
            f"{path} has the label '{min(unknown)}', and the classes are {', '.join(classes)}.",
            key=values.name, value=min(unknown), allowed=classes, path=path,
        )  # fmt: skip
    if is_multilabel:
        return [[int(name in names) for name in classes] for names in labels], classes
    return [classes.index(names[0]) for names in labels], classes


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
    frame.columns = frame.columns.str.strip()
    for name in columns:
        if header.count(name) != 1:
            raise UserError(
                f"{path} has {header.count(name)} columns '{name}'. It has: {', '.join(header)}. It needs each of "
                f"{', '.join(columns)} once, separated by commas; label_column names that of the labels.",
                key=name, allowed=header, path=path,
            )  # fmt: skip
    frame = frame.apply(lambda values: values.fillna("").str.strip())
    frame = frame[(frame != "").any(axis=1)].reset_index(drop=True)
    if frame.empty:
        raise UserError(f"{path} has no rows below its columns {', '.join(header)}.", path=path)
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
    """Return the image of each row; UserError for a name of several images, and for an image listed twice."""
    name_of_image: dict[str, str] = {}
    for name in names:
        matches = sorted(map(str, images_by_name[_file_key(name)]))
        if len(matches) > 1:
            raise UserError(
                f"{path} lists '{name}', and several images have that name: {', '.join(matches[:3])}. List paths.",
                key="file", value=name, allowed=matches, path=path,
            )  # fmt: skip
        if matches[0] in name_of_image:
            raise UserError(f"{path} lists {name} twice.", key="file", value=name, path=path)
        name_of_image[matches[0]] = name
    return list(name_of_image)
