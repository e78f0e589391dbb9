"""Overlapping tiles of a scene, and how much each counts where they overlap.

Tiles lie on one grid for the whole scene; a block of the map is made of all tiles that reach into it, so that it does
not matter in which order, or in how many runs, blocks are made.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Blocks of the map are of whole COG tiles, and of at least so many strides each way: tiles that reach over a block's
# edge are computed for both blocks.
COG_TILE, MIN_BLOCK_STRIDES = 512, 16


@dataclass(frozen=True)
class TileAxis:
    """Tiles along one side of a scene.

    Attributes:
        length: of the scene, in pixels.
        tile: of a tile, in pixels; it may be longer than the scene, which is then padded.
        overlap: of neighbouring tiles, in pixels.
        starts: of the tiles; the last is moved back to end with the scene.
        weight: of every pixel of the scene, the sum over tiles.
    """

    length: int
    tile: int
    overlap: int
    starts: np.ndarray
    weight: np.ndarray

    def overlapping(self, first: int, last: int) -> np.ndarray:
        """Starts of the tiles that have pixels in [first, last)."""
        return self.starts[(self.starts + self.tile > first) & (self.starts < last)]

    @property
    def block_size(self) -> int:
        """Side of a block of the map in pixels."""
        return -(-MIN_BLOCK_STRIDES * (self.tile - self.overlap) // COG_TILE) * COG_TILE


def tile_axis(length: int, tile: int, overlap: int) -> TileAxis:
    """Tiles from 0 on, the last of which ends with the scene."""
    starts = np.arange(0, max(length - tile, 0) + 1, tile - overlap)
    if starts[-1] + tile < length:
        starts = np.append(starts, length - tile)
    weight = np.zeros(max(length, tile), np.float32)
    for start in starts:
        weight[start : start + tile] += blend_window(tile, overlap)
    return TileAxis(length, tile, overlap, starts, weight[:length])


def blend_window(tile: int, overlap: int) -> np.ndarray:
    """Weights of a tile's pixels along one side, float32 (tile,): 1 within, falling to its edges over the overlap.

    A squared sine (a Tukey window): at a seam of two tiles the weights sum to one. Never zero, since at the edge of a
    scene there is but one tile.
    """
    rise = np.sin(np.pi / 2 * (np.arange(overlap) + 0.5) / overlap) ** 2 if overlap else np.empty(0)
    return np.concatenate([rise, np.ones(tile - 2 * overlap), rise[::-1]]).astype(np.float32)


@dataclass(frozen=True)
class OutputBlock:
    """A part of the map: its first row and column, and its size, in pixels."""

    row: int
    column: int
    height: int
    width: int


def output_blocks(rows: TileAxis, columns: TileAxis) -> Iterator[OutputBlock]:
    """All blocks of a map, in reading order."""
    for row in range(0, rows.length, rows.block_size):
        for column in range(0, columns.length, columns.block_size):
            height, width = min(rows.block_size, rows.length - row), min(columns.block_size, columns.length - column)
            yield OutputBlock(row, column, height, width)
