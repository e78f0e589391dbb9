"""A data set's images and labels for training on them: any sample at once, flipped and turned at random."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from pipeline.data.augmentation import VIEWS
from pipeline.data.image_store import UNLABELLED

# Samples brought at once from the store.
_STEP = 256


class Pictures:
    """Images in the store's own units and size, in one plain file that is mapped into memory.

    The store's chunks hold many samples each, and a batch at random would read most of them.

    Args:
        opened: an images store.
        path: of the file, which is written.

    Attributes:
        image: (sample, band, y, x).
        label: class index (sample,), multi-hot (sample, class) or mask (sample, y, x).
        sample, split: names of the samples and of their splits.
    """

    def __init__(self, opened: xr.Dataset, path: Path):
        # Nothing is asked of images without labels, which come last and may be most.
        count = int(np.flatnonzero(opened.split.values != UNLABELLED)[-1]) + 1
        shape = (count, *opened.image.shape[1:])
        described = {"descr": opened.image.dtype.str, "fortran_order": False, "shape": shape}
        # Written, and only then mapped: a full disk is an error of a write, and a crash of a mapped one.
        with open(path, "wb") as file:
            np.lib.format.write_array_header_2_0(file, described)
            for start in range(0, count, _STEP):
                file.write(np.ascontiguousarray(opened.image[start : min(start + _STEP, count)].values))
        self.image = np.load(path, mmap_mode="r")
        self.label = opened.label[:count].values
        self.sample, self.split = opened.sample.values[:count], opened.split.values[:count]
        square = self.image.shape[-1] == self.image.shape[-2]
        self._views = [VIEWS[name] for name in VIEWS if square or name in ("identity", "flip_x", "flip_y", "rot180")]

    def rows(self, split: str) -> np.ndarray:
        """The split's samples."""
        return np.flatnonzero(self.split == split)

    def batch(self, rows: Sequence[int], draw: np.random.Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of some samples; with `draw` each image and its mask in one of its views, at random."""
        image, label = self.image[rows], self.label[rows]
        if draw is None:
            return image, label
        for place, number in enumerate(draw.integers(len(self._views), size=len(rows))):
            view = self._views[number]
            image[place] = view(image[place].copy())
            if label.ndim == 3:
                label[place] = view(label[place].copy())
        return image, label
