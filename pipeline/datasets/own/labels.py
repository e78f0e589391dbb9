"""Labels of one's own: a table of images, masks beside them, or polygons over a scene."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import rasterio
from rasterio.features import rasterize
from rasterio.windows import Window

from pipeline.datasets.own.rasters import Picture
from pipeline.errors import UserError
from pipeline.images import IGNORE

_SEVERAL = "|"


@dataclass(frozen=True)
class Masks:
    """A raster of class indices for each image.

    Attributes:
        paths: of the mask by that of the image.
        ignore: the value that does not count, or None.
    """

    paths: Mapping[str, str]
    classes: tuple[str, ...]
    ignore: int | None

    def __call__(self, picture: Picture, window: Window) -> np.ndarray:
        path = self.paths[picture.paths[0]]
        file = _mask_file(path)
        if (file.height, file.width) != (picture.height, picture.width):
            raise UserError(
                f"{path} has {file.height} x {file.width} px, and its image {picture.height} x {picture.width}."
            )
        mask = file.read(1, window=window)
        outside = (mask < 0) | (mask >= len(self.classes))
        outside &= mask != self.ignore if self.ignore is not None else True
        if outside.any():
            raise UserError(
                f"{path} has the value {mask[outside][0]}; the classes are 0 to {len(self.classes) - 1}"
                f"{'' if self.ignore is None else f', and {self.ignore} is ignored'}."
            )
        return (
            mask.astype(np.uint8)
            if self.ignore is None
            else np.where(mask == self.ignore, IGNORE, mask).astype("uint8")
        )


@dataclass(frozen=True)
class Polygons:
    """Labelled polygons in the CRS of a scene; where they overlap the smaller one counts, elsewhere is no label.

    Attributes:
        path, crs, column, classes: where they are read from, once a process.
    """

    path: str
    crs: str
    column: str
    classes: tuple[str, ...]

    def __call__(self, picture: Picture, window: Window) -> np.ndarray:
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


def polygons(path: Path, picture: Picture, column: str, classes: Sequence[str]) -> tuple[Polygons, list[str]]:
    """Polygons of any format that geopandas reads, and notes on those that are not used.

    Raises:
        UserError: no such column, no CRS, or no polygon of the classes.
    """
    try:
        frame = geopandas.read_file(path)
    except Exception as error:  # the drivers raise their own
        raise UserError(f"{path} cannot be read as polygons: {' '.join(str(error).split())}") from None
    if column not in frame:
        raise UserError(f"{path} has no column '{column}'. It has: {', '.join(map(str, frame.columns))}.")
    if frame.crs is None or not picture.crs:
        raise UserError(f"{path if frame.crs is None else picture.paths[0]} states no coordinate reference system.")
    found = sorted(frame[column].dropna().astype(str).unique())
    if gone := [name for name in classes if name not in found]:
        raise UserError(f"{path} has no polygon of {', '.join(gone)}. Its '{column}' has: {', '.join(found)}.")
    unused = [name for name in found if classes and name not in classes]
    notes = [f"polygons of {', '.join(unused)} are not used"] if unused else []
    return Polygons(str(path), picture.crs, column, tuple(classes or found)), notes


@functools.lru_cache(maxsize=4)
def _polygons(given: Polygons):
    frame = geopandas.read_file(given.path).to_crs(given.crs)
    frame = frame[frame[given.column].isin(given.classes)]
    frame = frame.iloc[np.argsort(-frame.area.to_numpy(), kind="stable")].reset_index(drop=True)
    return frame.geometry, frame[given.column].map(given.classes.index).to_numpy()


@functools.lru_cache(maxsize=64)
def _mask_file(path: str):
    return rasterio.open(path)


def pair(images: Sequence[Path], masks: Sequence[Path]) -> dict[str, str]:
    """The mask of each image: the file of the same name, or the one whose name contains the image's.

    Raises:
        UserError: an image without a mask, or with several.
    """
    exact, found = {path.stem: path for path in masks}, {}
    for image in images:
        fit = [exact[image.stem]] if image.stem in exact else [path for path in masks if image.stem in path.stem]
        if len(fit) != 1:
            names = ", ".join(path.name for path in fit[:4]) or "none"
            raise UserError(
                f"{image} has {len(fit)} masks ({names}); a mask has the name of its image, or one that contains it."
            )
        found[str(image)] = str(fit[0])
    return found


def table(path: Path, images: Sequence[Path], column: str, classes: Sequence[str], several: bool) -> pd.DataFrame:
    """A CSV with one row an image: columns `file`, the label's, and, if they are there, `split` and `time`.

    Args:
        several: labels are class names joined by `|`.

    Returns:
        path, label (index, or list of zeros and ones), split and time, a row an image; the classes are in `attrs`.

    Raises:
        UserError: a column, file or class that is not there, or a file listed twice.
    """
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    for name in ("file", column):
        if name not in frame:
            raise UserError(f"{path} has no column '{name}'. It has: {', '.join(frame.columns)}.")
    known = {key: image for image in images for key in (str(image), image.name, image.stem)}
    known |= {str(image.relative_to(path.parent)): image for image in images if image.is_relative_to(path.parent)}
    if gone := [name for name in frame.file if name not in known]:
        raise UserError(f"{path} lists {gone[0]}, and there is no such image.")
    frame["path"] = [str(known[name]) for name in frame.file]
    if frame.path.duplicated().any():
        raise UserError(f"{path} lists {frame.file[frame.path.duplicated()].iloc[0]} twice.")
    said = [value.split(_SEVERAL) if several else [value] for value in frame[column]]
    named = list(classes) or sorted({name for names in said for name in names if name})
    if strange := {name for names in said for name in names if name} - set(named):
        raise UserError(f"{path} has the label '{min(strange)}', and the classes are {', '.join(named)}.")
    if several:
        frame["label"] = [[int(name in names) for name in named] for names in said]
    else:
        if "" in frame[column].values:
            raise UserError(f"{path}: {frame.file[frame[column] == ''].iloc[0]} has no label.")
        frame["label"] = [named.index(names[0]) for names in said]
    frame.attrs["classes"] = tuple(named)
    return frame
