"""NEON trees: two crops of an RGB camera mosaic over Yellowstone, 0.1 m, with boxes of crowns.

The images resemble those of GEO-Bench's m-NeonTree. The location of the crops within their 1 km tiles is not
published, so the images store has no lat and lon.
"""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.bands import Band
from pipeline.config import DatasetConfig
from pipeline.data.download import PinnedWheel
from pipeline.data.image_store import SPLITS, ImageDataset
from pipeline.data.splits import assign_blocks_to_splits, chip_corners, crop
from pipeline.errors import UserError
from pipeline.tasks import get_task

ARCHIVE = PinnedWheel(
    package="deepforest",
    version="2.1.0",
    filename="deepforest-2.1.0-py3-none-any.whl",
    sha256="8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
    members=(
        "deepforest/data/2019_YELL_2_528000_4978000_image_crop2.*",
        "deepforest/data/2019_YELL_2_541000_4977000_image_crop.*",
    ),
    licence="MIT (DeepForest contributors); imagery of the National Ecological Observatory Network",
    source="NEON site YELL, 2019, RGB camera mosaic, crops and boxes from deepforest 2.1.0",
)
REQUIRED_KEYS = ("task", "chip", "block", "splits")
# The bands of a camera are broad; these are their usual nominal centres.
BANDS = (Band("R", "red", 0.665, 0.1), Band("G", "green", 0.560, 0.1), Band("B", "blue", 0.490, 0.1))
CLASSES = ("background", "tree")
# A chip is a tree if boxes cover at least this fraction of it, and background if they cover none of it.
MIN_TREE_FRACTION = 0.2


def prepare(raw: Path, dataset: DatasetConfig) -> ImageDataset:
    """Crop both images into chips of trees or background, or into tiles with masks of the boxes.

    Chips that boxes cover in part, by less than `MIN_TREE_FRACTION`, are skipped in classification.
    """
    task = get_task(dataset.task)
    if task.is_multilabel:
        raise UserError(
            "Source 'neon_trees' has the classes background and tree, which exclude each other. Use the task "
            "classification or segmentation.",
            key="task", value=dataset.task, allowed=("classification", "segmentation"),
        )  # fmt: skip
    chips, mask_chips, names, block_ids = [], [], [], []
    for path in sorted(raw.glob("*.png")):
        image = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
        mask = box_mask(path.with_suffix(".xml"), image.shape[1:])
        for row, column in chip_corners(mask.shape[0], mask.shape[1], dataset.chip):
            chips.append(crop(image, (row, column), dataset.chip))
            mask_chips.append(crop(mask, (row, column), dataset.chip))
            names.append(f"{path.stem.split('_image')[0]}_r{row:04d}c{column:04d}")
            block_ids.append(str((path.stem, row // dataset.block, column // dataset.block)))
    if not chips:
        raise UserError(
            f"{raw} contains no PNG images of at least {dataset.chip} px. Fetch it again, or use smaller chips.",
            key="chip", value=dataset.chip, path=raw,
        )  # fmt: skip
    images, masks = np.stack(chips), np.stack(mask_chips)
    tree_fraction = masks.mean(axis=(1, 2))
    unique_ids, block = np.unique(block_ids, return_inverse=True)
    class_areas = np.zeros((len(unique_ids), 2))
    tree_pixels = masks.sum(axis=(1, 2), dtype=np.int64)
    np.add.at(class_areas, block, np.stack([dataset.chip**2 - tree_pixels, tree_pixels], axis=1))
    split_of_block = assign_blocks_to_splits(class_areas, dataset.splits, dataset.seed)

    if task.is_dense:
        selected, label = np.arange(len(images)), masks
        notes = ["masks are the filled boxes, so the corners around crowns count as tree"]
    else:
        selected = np.flatnonzero((tree_fraction == 0) | (tree_fraction >= MIN_TREE_FRACTION))
        label = (tree_fraction >= MIN_TREE_FRACTION).astype(np.int64)
        notes = [
            f"tree where boxes cover at least {MIN_TREE_FRACTION:.0%} of a chip, background where none; others are "
            "skipped"
        ]
    return ImageDataset(
        image=images[selected],
        label=label[selected],
        sample=[names[index] for index in selected],
        split=[SPLITS[split_of_block[block[index]]] for index in selected],
        bands=BANDS, classes=CLASSES, task=dataset.task, units="uint8", gsd=0.1, licence=ARCHIVE.licence,
        source=ARCHIVE.source, notes=notes,
    )  # fmt: skip


def box_mask(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Draw the Pascal VOC boxes of a file into a mask, uint8 (y, x): 1 inside any box, else 0."""
    mask = np.zeros(shape, dtype=np.uint8)
    for item in ElementTree.parse(path).iter("bndbox"):
        box = left, top, right, bottom = tuple(int(item.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
        if not (0 <= left < right <= shape[1] and 0 <= top < bottom <= shape[0]):
            raise UserError(
                f"{path.name}: box {box} lies outside the image of {shape[1]} x {shape[0]} px.",
                key="bndbox", value=box, path=path,
            )  # fmt: skip
        mask[top:bottom, left:right] = 1
    return mask
