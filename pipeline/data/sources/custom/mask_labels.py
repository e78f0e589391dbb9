"""Labels of one's own as masks: rasters of class indices beside the images."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.windows import Window

from pipeline.data.image_store import IGNORE
from pipeline.data.sources.custom.rasters import RasterImage, is_georeferenced, translate_errors
from pipeline.data.sources.custom.scenes import has_token
from pipeline.errors import UserError


@dataclass(frozen=True)
class MaskLabels:
    """A raster of class indices for each image.

    Attributes:
        paths: of the mask by that of the image.
        ignore: the value that does not count, or None.
    """

    paths: Mapping[str, str]
    classes: tuple[str, ...]
    ignore: int | None

    def __call__(self, picture: RasterImage, window: Window) -> np.ndarray:
        path = self.paths[picture.paths[0]]
        with translate_errors(path):
            file = _opened(path)
            _same_grid(path, file, picture)
            mask = file.read(1, window=window)
        # 0.5 and what is no number are no classes either; a cast would make them one.
        outside = ~np.isin(mask, np.arange(len(self.classes)))
        outside &= mask != self.ignore if self.ignore is not None else True
        if outside.any():
            raise UserError(
                f"{path} has the value {mask[outside][0]}; the classes are 0 to {len(self.classes) - 1}"
                f"{'' if self.ignore is None else f', and {self.ignore} is ignored'}."
            )
        return (mask if self.ignore is None else np.where(mask == self.ignore, IGNORE, mask)).astype(np.uint8)


def pair_masks(images: Sequence[Path], masks: Sequence[Path], skip_bad: bool, notes: list[str]) -> dict[str, str]:
    """The mask of each image: the file of the same name, or the one whose name contains the image's.

    Of several, as where folders repeat names, the one whose folder is named as the image's. Images that have none are
    left out if that may be, and the notes say so.

    Raises:
        UserError: an image without a mask, or with several, or a mask that fits several images.
    """
    found: dict[Path, Path] = {}
    called: dict[str, list[Path]] = {}
    for path in masks:
        called.setdefault(path.stem, []).append(path)
    folders = {path.parent for path in masks}
    # Where masks lie in a folder named as an image's, those in others are of other images.
    near = {one: max(_alike(folder, one) for folder in folders) for one in {image.parent for image in images}}
    for image in images:
        within = [] if image.stem in called else [path for path in masks if image.stem in path.stem]
        # Of tile_1_mask and tile_10_mask, which both contain tile_1, the one that has it whole.
        fit = called.get(image.stem) or [path for path in within if has_token(path.stem, image.stem)]
        fit = fit or (within if len(within) == 1 else [])
        alike = [_alike(path.parent, image.parent) for path in fit]
        best = max(alike, default=0)
        best = -1 if near[image.parent] and not best else best
        fit = [path for path, parts in zip(fit, alike, strict=True) if parts == best]
        if not fit and skip_bad:
            notes.append(f"left out: {image} has no mask")
            continue
        if len(fit) != 1:
            names = ", ".join(path.name for path in fit[:4]) or "none"
            raise UserError(
                f"{image} has {len(fit)} masks ({names}); a mask has the name of its image, or one that contains it."
            )
        if fit[0] in found:
            raise UserError(
                f"{fit[0]} is the mask of both {found[fit[0]]} and {image}; a mask has the name of its image, or one "
                "that contains it, and where folders repeat names, a folder named as the image's."
            )
        found[fit[0]] = image
    if not found:
        raise UserError(
            f"None of {len(images)} images, such as {images[0]}, has a mask; a mask has its image's name."
        )
    return {str(image): str(mask) for mask, image in found.items()}


def _alike(one: Path, other: Path) -> int:
    """How many parts two paths share from their ends."""
    count = 0
    while count < min(len(one.parts), len(other.parts)) and one.parts[-1 - count] == other.parts[-1 - count]:
        count += 1
    return count


def _same_grid(path: str, file, picture: RasterImage) -> None:
    if file.count != 1:
        raise UserError(f"{path} has {file.count} bands; a mask has one, of the classes' numbers.")
    if (file.height, file.width) != (picture.height, picture.width):
        raise UserError(
            f"{path} has {file.height} x {file.width} px, and its image {picture.height} x {picture.width}."
        )
    if not is_georeferenced(file.transform, file.height) or not is_georeferenced(picture.transform, picture.height):
        return
    back = ~rasterio.Affine(*picture.transform) @ file.transform
    gap = max(np.abs(np.subtract(back @ end, end)).max() for end in ((0, 0), (file.width, file.height)))
    if (file.crs and picture.crs and file.crs != CRS.from_wkt(picture.crs)) or gap > 0.5:
        raise UserError(f"{path} does not lie on the ground where its image {picture.paths[0]} does.")


@functools.lru_cache(maxsize=64)
def _opened(path: str):
    return rasterio.open(path)
