"""Assign the spatial blocks of the sample classification datasets to splits again, by another seed.

Classes are counted over the chips that exist; `prepare` counts the whole area of a block. So seed 0 does not
reproduce the splits of `prepare`.
"""

import re
from pathlib import Path

import numpy as np
import xarray as xr

from benchmarks.features import FOLDER, change_images
from pipeline.config import DatasetConfig
from pipeline.data import image_writer
from pipeline.data.image_store import SPLITS, open_images
from pipeline.data.splits import assign_blocks_to_splits


def assign_splits(images: xr.Dataset, dataset: DatasetConfig, seed: int) -> np.ndarray:
    """Return the split of every chip; the chips of a block are in one split."""
    positions = [re.fullmatch(r"(.*)r(\d+)c(\d+)", name).groups() for name in images.sample.values]
    block_ids = [
        f"{image} {int(row) // dataset.block} {int(column) // dataset.block}" for image, row, column in positions
    ]
    names, block = np.unique(block_ids, return_inverse=True)
    counts = np.zeros((len(names), len(images.attrs["classes"])))
    np.add.at(counts, (block, images.label.values), 1)
    return np.array(SPLITS)[assign_blocks_to_splits(counts, dataset.splits, seed)[block]]


def write_resplit_images(name: str, dataset: DatasetConfig, seed: int) -> Path:
    """Write an images store of a dataset's chips in other splits; returns its path."""
    path = FOLDER / f"{name}-resplit-images.zarr"
    images = open_images(Path(f"data/images/{name}.zarr"))
    resplit = change_images(images, split=assign_splits(images, dataset, seed))
    image_writer.write(resplit, FOLDER / "scratch-images", path)
    return path
