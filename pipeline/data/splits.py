"""Chips on a grid, and spatial blocks dealt whole to the splits, so that neighbours stay together."""

import numpy as np

from pipeline.config import SplitFractions
from pipeline.errors import UserError

SPLITS = ("train", "val", "test")


def chip_corners(height: int, width: int, chip_size: int) -> np.ndarray:
    """Upper left corners (row, column) of the whole, non-overlapping chips of an image, as int (n, 2)."""
    rows, columns = np.arange(height // chip_size) * chip_size, np.arange(width // chip_size) * chip_size
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)


def crop(image: np.ndarray, corner: np.ndarray, chip_size: int) -> np.ndarray:
    """One chip (…, chip, chip) of an image (…, y, x)."""
    row, column = corner
    return image[..., row : row + chip_size, column : column + chip_size]


def fill_nodata(chip: np.ndarray, is_valid: np.ndarray) -> np.ndarray:
    """A chip (band, y, x) with each band's mean of the known pixels (y, x) in place of the others."""
    if is_valid.all():
        return chip
    mean = chip.mean(axis=(1, 2), where=is_valid, keepdims=True)
    return np.where(is_valid, chip, mean if chip.dtype.kind == "f" else np.rint(mean)).astype(chip.dtype)


def assign_blocks_to_splits(class_areas: np.ndarray, splits: SplitFractions, seed: int, n_draws: int = 20000) -> np.ndarray:
    """Deal blocks to train, val and test so that each split's label shares are near the whole's.

    Of `draws` random deals the one is kept whose worst class share is closest to the wanted fraction.
    Only label counts are looked at, never a model's score.

    Args:
        counts: how much of each class lies in each block, (block, class), any unit.
        splits: wanted fractions.
        seed: of the random deals.

    Returns:
        The split's index in `SPLITS` of every block, (block,).

    Raises:
        UserError: too few blocks for three splits.
    """
    fractions = np.array([splits.train, splits.val, splits.test])
    blocks = len(class_areas)
    sizes = np.maximum(np.round(fractions * blocks).astype(int), 1)
    sizes[0] = blocks - sizes[1:].sum()
    if sizes[0] < 1:
        raise UserError(
            f"{blocks} blocks, of ground or an image each, cannot fill three splits. Give a smaller 'block' in the "
            "dataset's description, or more images."
        )
    deal = np.repeat(np.arange(3), sizes)
    generator = np.random.default_rng(seed)
    totals = np.maximum(class_areas.sum(axis=0), 1e-9)
    best, best_gap = None, np.inf
    for _ in range(n_draws):
        generator.shuffle(deal)
        shares = np.stack([class_areas[deal == split].sum(axis=0) for split in range(3)]) / totals
        gap = np.max(np.abs(shares - fractions[:, None]) / fractions[:, None])
        if gap < best_gap:
            best, best_gap = deal.copy(), gap
    return best
