"""Back on the map: what was predicted for chips becomes a GeoTIFF in their own coordinate reference system."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio
import xarray as xr

from pipeline.data.image_store import IGNORE
from pipeline.errors import UserError


def geotiff(images: xr.Dataset, rows: Sequence[int], values: np.ndarray, path: Path) -> None:
    """Write maps of chips as one GeoTIFF; where no chip lies it says `IGNORE`.

    Args:
        images: the images store that the chips are of.
        rows: their places in it.
        values: classes, uint8 (chip, y, x), of any size: a cell of a chip may be larger than its pixels.

    Raises:
        UserError: values that are no classes of these chips, or chips without a place, in several reference systems,
            or not on one grid.
    """
    values = np.asarray(values)
    _check(images, rows, values)
    if "transform" not in images.coords or "crs" not in images.coords:
        raise UserError("These images have no place on a map: their store keeps no 'crs' and 'transform'.")
    if len(systems := set(images.crs[rows].values.tolist())) != 1:
        raise UserError(f"The chips lie in {len(systems)} coordinate reference systems; write a file of each.")
    a, b, left, d, e, top = images.transform[rows].values.T
    height, width = values.shape[1:]
    across, down = images.sizes["x"] / width, images.sizes["y"] / height
    steps = (a[0] * across, e[0] * down)
    if b.any() or d.any() or len({*a}) > 1 or len({*e}) > 1:
        raise UserError("The chips are turned, or differ in the size of their pixels, and so have no grid in common.")
    west, north = (left.min() if a[0] > 0 else left.max()), (top.max() if e[0] < 0 else top.min())
    columns, lines = (left - west) / steps[0], (top - north) / steps[1]
    if np.abs(columns - columns.round()).max() > 0.01 or np.abs(lines - lines.round()).max() > 0.01:
        raise UserError("The chips do not lie on one grid.")
    columns, lines = columns.round().astype(int), lines.round().astype(int)
    mosaic = np.full((lines.max() + height, columns.max() + width), IGNORE, np.uint8)
    for line, column, value in zip(lines, columns, values, strict=True):
        mosaic[line : line + height, column : column + width] = value
    transform = rasterio.Affine(steps[0], 0, west, 0, steps[1], north)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", height=mosaic.shape[0], width=mosaic.shape[1], count=1, dtype="uint8",
        crs=systems.pop(), transform=transform, nodata=IGNORE, compress="deflate",
    ) as file:  # fmt: skip
        file.write(mosaic, 1)
        file.update_tags(classes=", ".join(images.attrs["classes"]))


def _check(images: xr.Dataset, rows: Sequence[int], values: np.ndarray) -> None:
    if values.ndim != 3 or len(values) != len(rows) or not len(rows):
        raise UserError(
            f"Values of the shape {values.shape} for {len(rows)} chips; a map takes a class a cell, (chip, y, x)."
        )
    classes = images.attrs["classes"]
    if outside := sorted(set(np.unique(values).tolist()) - {*range(len(classes)), IGNORE})[:1]:
        raise UserError(
            f"Values have {outside[0]}; a map holds classes, 0 to {len(classes) - 1}, and {IGNORE} for none. "
            "Take the argmax of logits first."
        )
