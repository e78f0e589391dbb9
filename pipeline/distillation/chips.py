"""The images that a student sees, turned and flipped, with their labels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from pipeline.data import image_store
from pipeline.data.augmentation import VIEWS

# Views that keep the shape of a chip that is not square.
_FLIPS = ("identity", "flip_x", "flip_y", "rot180")
_STEP = 256


class Chips:
    """An images store, its pixels in memory if they take at most `memory` GB, else read batch by batch.

    Attributes:
        store: opened.
        views: names of the symmetries that its chips may be turned by.
        mean, std: of each band over the training split, in the store's units.
    """

    def __init__(self, pictures: Path, memory: float):
        self.store = image_store.open_images(pictures)
        self.dense = self.store.attrs["task"] == "segmentation"
        square = self.store.sizes["y"] == self.store.sizes["x"]
        self.views = tuple(VIEWS) if square else _FLIPS
        fits = self.store.image.nbytes <= memory * 1e9
        self._image: np.ndarray | xr.DataArray = self.store.image.values if fits else self.store.image
        self._label = self.store.label.values if fits or not self.dense else self.store.label
        self.split = self.store.split.values
        self.mean, self.std = self._moments()

    @property
    def size(self) -> tuple[int, int]:
        return self.store.sizes["y"], self.store.sizes["x"]

    def rows(self, *splits: str) -> np.ndarray:
        """Numbers of the samples of these splits, ascending."""
        return np.flatnonzero(np.isin(self.split, splits))

    def taught(self) -> np.ndarray:
        """Samples that a student may learn from."""
        return self.rows("train", image_store.UNLABELLED)

    def image(self, rows: np.ndarray, views: Sequence[str] | None = None) -> torch.Tensor:
        """Float32 (batch, band, y, x), each chip turned by its view; channels last."""
        pixels = turned(np.asarray(self._image[rows]).astype(np.float32), views)
        return torch.from_numpy(pixels).contiguous(memory_format=torch.channels_last)

    def label(self, rows: np.ndarray, views: Sequence[str] | None = None) -> torch.Tensor:
        """Labels int64 (batch,), (batch, class) or (batch, y, x), the masks turned as their chips are."""
        label = np.asarray(self._label[rows])
        return torch.from_numpy((turned(label, views) if self.dense else label).astype(np.int64))

    def _moments(self) -> tuple[list[float], list[float]]:
        """In float64, part by part."""
        rows, parts = self.rows("train"), []
        for start in range(0, len(rows), _STEP):
            values = np.asarray(self._image[rows[start : start + _STEP]]).astype(np.float64)
            parts.append((values.sum(axis=(0, 2, 3)), np.square(values).sum(axis=(0, 2, 3))))
        count = len(rows) * self.size[0] * self.size[1]
        total, squares = (sum(each) for each in zip(*parts, strict=True))
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        # A band that never changes says nothing; dividing by its spread would make noise of it.
        std[std <= 1e-6 * np.abs(mean)] = 1.0
        return mean.tolist(), std.tolist()


def turned(arrays: np.ndarray, views: Sequence[str] | None) -> np.ndarray:
    """Each of the arrays (batch, …, y, x) by its view (pipeline/data/augmentation.py); None leaves them."""
    if views is None:
        return arrays
    return np.stack([VIEWS[view](one) for view, one in zip(views, arrays, strict=True)])
