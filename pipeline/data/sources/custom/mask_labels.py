"""Labels as masks: rasters of class indices on the grid of the images."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.windows import Window

from pipeline.data.sources.custom.rasters import RasterImage, has_token, is_georeferenced, translate_rasterio_errors
from pipeline.errors import UserError
from pipeline.tasks import IGNORE


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
    # Where some masks lie in a folder named like an image's folder, masks elsewhere belong to other images.
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
    """Raise UserError if a mask does not lie on the grid of its image."""
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
