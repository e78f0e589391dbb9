"""Aerial trees: two crops of NEON's RGB camera mosaic over Yellowstone, 0.1 m, with hand-drawn crown boxes.

The same kind of image as GEO-Bench's m-NeonTree. The place of the crops within their 1 km tiles is not
published, so the store has no lat and lon.
"""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.bands import Band
from pipeline.config import DatasetConfig
from pipeline.data.download import PinnedWheel
from pipeline.data.image_store import ImageDataset
from pipeline.data.splits import SPLITS, assign_blocks_to_splits, chip_corners, crop
from pipeline.errors import UserError

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
# A camera's bands are broad; these are the usual nominal centres.
BANDS = (
    Band("R", "red", 0.665, 0.1),
    Band("G", "green", 0.560, 0.1),
    Band("B", "blue", 0.490, 0.1),
)
CLASSES = ("background", "tree")
# A chip shows a tree if boxes cover this share of it, and background if they cover none of it.
TREE_SHARE = 0.2


def prepare(raw: Path, dataset: DatasetConfig) -> ImageDataset:
    """Cut both crops into chips (tree or background; in between is left out) or into tiles with box masks."""
    if dataset.task == "multilabel":
        raise UserError("Source 'trees' has one question, tree or not: use classification or segmentation.")
    chips, masks, names, homes = [], [], [], []
    for path in sorted(raw.glob("*.png")):
        image = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
        mask = box_mask(path.with_suffix(".xml"), image.shape[1:])
        for row, column in chip_corners(*mask.shape, dataset.chip):
            chips.append(crop(image, (row, column), dataset.chip))
            masks.append(crop(mask, (row, column), dataset.chip))
            names.append(f"{path.stem.split('_image')[0]}_r{row:04d}c{column:04d}")
            homes.append((path.stem, row // dataset.block, column // dataset.block))
    if not chips:
        raise UserError(f"{raw} holds no PNG images of at least {dataset.chip} px. Fetch it again.")
    images, masks = np.stack(chips), np.stack(masks)
    share = masks.mean(axis=(1, 2))

    # Blocks are named by image and place; those at an image's edge may be smaller.
    block_names, block = np.unique([str(home) for home in homes], return_inverse=True)
    areas = np.zeros((len(block_names), 2))
    np.add.at(areas, block, np.stack([1 - share, share], axis=1))
    deal = assign_blocks_to_splits(areas, dataset.splits, dataset.seed)

    notes = ["masks are the annotated boxes filled in, so crowns' corners count as tree"]
    keep = np.ones(len(images), dtype=bool)
    label = masks
    if dataset.task == "classification":
        keep = (share == 0) | (share >= TREE_SHARE)
        label = (share >= TREE_SHARE).astype(np.int64)
        notes = [f"tree where boxes cover at least {TREE_SHARE:.0%} of a chip, background where none; rest left out"]
    chosen = np.flatnonzero(keep)
    return ImageDataset(
        image=images[chosen],
        label=label[chosen],
        sample=[names[index] for index in chosen],
        split=[SPLITS[deal[block[index]]] for index in chosen],
        bands=BANDS,
        classes=CLASSES,
        task=dataset.task,
        units="uint8",
        gsd=0.1,
        licence=ARCHIVE.licence,
        source=ARCHIVE.source,
        notes=notes,
    )


def box_mask(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Pascal VOC boxes filled in: 1 inside any box, else 0; uint8 (y, x).

    Raises:
        UserError: a box reaches outside the image, as when x and y are swapped.
    """
    mask = np.zeros(shape, dtype=np.uint8)
    for item in ElementTree.parse(path).iter("bndbox"):
        left, top, right, bottom = (int(item.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
        if not (0 <= left < right <= shape[1] and 0 <= top < bottom <= shape[0]):
            raise UserError(f"{path.name}: box {(left, top, right, bottom)} lies outside {shape[1]}x{shape[0]} px.")
        mask[top:bottom, left:right] = 1
    return mask
