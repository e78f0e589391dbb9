"""The eight symmetries of a square, and images read with one of them applied.

A backbone encodes each view itself: rotating cached features differs from the features of a rotated image.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from cache.running_stats import mean_std_from_sums
from pipeline.data.image_store import UNLABELLED, open_images
from pipeline.tasks import get_task

# On arrays (…, y, x) with y downwards; `rot90` is a quarter turn anticlockwise on the screen.
VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": lambda image: image,
    "flip_x": lambda image: image[..., ::-1],
    "flip_y": lambda image: image[..., ::-1, :],
    "rot90": lambda image: np.rot90(image, 1, axes=(-2, -1)),
    "rot180": lambda image: np.rot90(image, 2, axes=(-2, -1)),
    "rot270": lambda image: np.rot90(image, 3, axes=(-2, -1)),
    "transpose": lambda image: np.swapaxes(image, -2, -1),
    "antitranspose": lambda image: np.rot90(np.swapaxes(image, -2, -1), 2, axes=(-2, -1)),
}
# Views that keep the shape of an image that is not square.
SHAPE_PRESERVING = ("identity", "flip_x", "flip_y", "rot180")
# Samples that are read from a store at once.
READ_BATCH = 256


def apply_views(arrays: np.ndarray, views: Sequence[str] | None) -> np.ndarray:
    """Transform each of the arrays (batch, …, y, x) by its view; None returns them unchanged."""
    if views is None:
        return arrays
    return np.stack([VIEWS[view](array) for view, array in zip(views, arrays, strict=True)])


class AugmentedImages:
    """Images and labels of a dataset for training on pixels: any sample in any view that keeps its shape."""

    def __init__(self, images: xr.Dataset, pixels: np.ndarray | xr.DataArray, label: np.ndarray | xr.DataArray):
        self.images, self._pixels, self._label = images, pixels, label
        self.task = get_task(images.attrs["task"])
        self.sample, self.split = images.sample.values, images.split.values
        self.views = tuple(VIEWS) if images.sizes["y"] == images.sizes["x"] else SHAPE_PRESERVING

    @classmethod
    def load(cls, images_path: Path, max_gb: float) -> "AugmentedImages":
        """Open an images store, and read it into memory if its pixels take at most `max_gb` gigabytes."""
        images = open_images(images_path)
        if images.image.nbytes <= max_gb * 1e9:
            return cls(images, images.image.values, images.label.values)
        is_dense = get_task(images.attrs["task"]).is_dense
        return cls(images, images.image, images.label if is_dense else images.label.values)

    @classmethod
    def copy_to_file(cls, images: xr.Dataset, path: Path) -> "AugmentedImages":
        """Copy the pixels of all labelled samples, which come first, into a file, and map it into memory.

        A chunk of the store contains many samples, so a random batch would read most of the store.
        """
        count = int(np.flatnonzero(images.split.values != UNLABELLED)[-1]) + 1
        shape = (count, *images.image.shape[1:])
        # Write first and map afterwards: on a full disk a write raises an error, and a mapped file kills the process.
        with open(path, "wb") as file:
            np.lib.format.write_array_header_2_0(
                file, {"descr": images.image.dtype.str, "fortran_order": False, "shape": shape}
            )
            for start in range(0, count, READ_BATCH):
                file.write(np.ascontiguousarray(images.image[start : min(start + READ_BATCH, count)].values))
        return cls(images.isel(sample=slice(count)), np.load(path, mmap_mode="r"), images.label[:count].values)

    def rows(self, *splits: str) -> np.ndarray:
        """Indices of the samples of these splits, ascending."""
        return np.flatnonzero(np.isin(self.split, splits))

    def draw_views(self, count: int, generator: np.random.Generator) -> list[str]:
        """Draw a view for each of `count` samples, uniformly."""
        return [self.views[index] for index in generator.integers(len(self.views), size=count)]

    def image(self, rows: np.ndarray, views: Sequence[str] | None = None) -> np.ndarray:
        """Return images (batch, band, y, x), each under its view, in the store's dtype and units."""
        return apply_views(np.asarray(self._pixels[rows]), views)

    def label(self, rows: np.ndarray, views: Sequence[str] | None = None) -> np.ndarray:
        """Return labels (batch,), (batch, class) or (batch, y, x); masks are transformed with their images."""
        label = np.asarray(self._label[rows])
        return apply_views(label, views) if self.task.is_dense else label

    def batch(self, rows: np.ndarray, generator: np.random.Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return `image` and `label` of a batch, under views that `generator` draws, if there is one."""
        views = self.draw_views(len(rows), generator) if generator else None
        return self.image(rows, views), self.label(rows, views)

    def image_tensor(self, rows: np.ndarray, views: Sequence[str] | None = None) -> torch.Tensor:
        """Return `image` as float32, channels last."""
        pixels = self.image(rows, views).astype(np.float32)
        return torch.from_numpy(pixels).contiguous(memory_format=torch.channels_last)

    def label_tensor(self, rows: np.ndarray, views: Sequence[str] | None = None) -> torch.Tensor:
        """Return `label` as int64."""
        return torch.from_numpy(self.label(rows, views).astype(np.int64))

    @property
    def mean(self) -> list[float]:
        """Mean of each band over the training split, in the store's units."""
        return self._mean_and_std[0]

    @property
    def std(self) -> list[float]:
        """Standard deviation of each band over the training split; 1 for a constant band."""
        return self._mean_and_std[1]

    @cached_property
    def _mean_and_std(self) -> tuple[list[float], list[float]]:
        rows, sums, squares = self.rows("train"), [], []
        for start in range(0, len(rows), READ_BATCH):
            values = np.asarray(self._pixels[rows[start : start + READ_BATCH]]).astype(np.float64)
            sums.append(values.sum(axis=(0, 2, 3)))
            squares.append(np.square(values).sum(axis=(0, 2, 3)))
        count = len(rows) * self.images.sizes["y"] * self.images.sizes["x"]
        mean, std = mean_std_from_sums(count, sum(sums), sum(squares))
        # Dividing a constant band by its standard deviation would amplify rounding errors.
        std[std <= 1e-6 * np.abs(mean)] = 1.0
        return mean.tolist(), std.tolist()
