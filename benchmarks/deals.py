"""The sample sets of chips with their spatial blocks dealt to the splits anew, whole, by another seed.

By the classes of the chips that are there, where `prepare` counts all that a block has: seed 0 is not its deal.
"""

import re
from pathlib import Path

import numpy as np

from benchmarks.features import FOLDER, remade
from pipeline import config
from pipeline.data import image_writer
from pipeline.data.image_store import SPLITS, open_images
from pipeline.data.splits import assign_blocks_to_splits


def deal(labelled, described: config.DatasetConfig, seed: int) -> np.ndarray:
    """The split of every chip, whole blocks at a time."""
    places = [re.fullmatch(r"(.*)r(\d+)c(\d+)", name).groups() for name in labelled.sample.values]
    homes = [
        f"{image} {int(row) // described.block} {int(column) // described.block}" for image, row, column in places
    ]
    names, block = np.unique(homes, return_inverse=True)
    counts = np.zeros((len(names), len(labelled.attrs["classes"])))
    np.add.at(counts, (block, labelled.label.values), 1)
    return np.array(SPLITS)[assign_blocks_to_splits(counts, described.splits, seed)[block]]


def store(dataset: str, described: config.DatasetConfig, seed: int) -> Path:
    """Write an images store of the same chips in other splits."""
    path = FOLDER / f"{dataset}-dealt-images.zarr"
    opened = open_images(Path(f"data/images/{dataset}.zarr"))
    made = remade(opened, split=deal(opened, described, seed))
    image_writer.write(made, FOLDER / "scratch-images", path)
    return path
