"""Overlapping tiles of a scene, their weights in the blend, and the blocks of the map.

The tiles lie on one grid for the whole scene, and a block is computed from all tiles that overlap it. The order of
the blocks, and the number of runs, therefore do not change the map.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Side in pixels of the tiles of the GeoTIFF. Blocks consist of whole ones.
COG_TILE = 512
# Smallest side of a block in strides of the prediction tiles. Tiles across the edge of a block are predicted for both
# blocks, so smaller blocks cost more.
MIN_BLOCK_STRIDES = 16


@dataclass(frozen=True)
class TileAxis:
    """Tiles along one side of a scene, in pixels.

    Attributes:
        length: length of the scene.
        tile: length of a tile. It may exceed the scene, which is then padded.
        overlap: overlap of neighbouring tiles.
        starts: first pixels of the tiles, int (tile,). The last tile is moved back to end with the scene.
        weight: sum of the tiles' blend weights at every pixel of the scene, float32 (length,).
    """

    length: int
    tile: int
    overlap: int
    starts: np.ndarray
    weight: np.ndarray

    def overlapping(self, first: int, last: int) -> np.ndarray:
        """Return the starts of the tiles that have pixels in [first, last)."""
        return self.starts[(self.starts + self.tile > first) & (self.starts < last)]

    @property
    def block_size(self) -> int:
        """Side of a block of the map in pixels."""
        return -(-MIN_BLOCK_STRIDES * (self.tile - self.overlap) // COG_TILE) * COG_TILE


def tile_axis(length: int, tile: int, overlap: int) -> TileAxis:
    """Place tiles from pixel 0 on; the last one ends with the scene."""
    starts = np.arange(0, max(length - tile, 0) + 1, tile - overlap)
    if starts[-1] + tile < length:
        starts = np.append(starts, length - tile)
    weight = np.zeros(max(length, tile), np.float32)
    for start in starts:
        weight[start : start + tile] += blend_window(tile, overlap)
    return TileAxis(length, tile, overlap, starts, weight[:length])


def blend_window(tile: int, overlap: int) -> np.ndarray:
    """Compute the blend weights of a tile along one side, float32 (tile,).

    They are 1 inside and fall to the edges over the overlap as a squared sine (Tukey window), so that the weights of
    two tiles sum to 1 at their seam. They are never 0, since a pixel at the edge of a scene has a single tile.
    """
    rise = np.sin(np.pi / 2 * (np.arange(overlap) + 0.5) / overlap) ** 2 if overlap else np.empty(0)
    return np.concatenate([rise, np.ones(tile - 2 * overlap), rise[::-1]]).astype(np.float32)


@dataclass(frozen=True)
class OutputBlock:
    """A block of the map: its first row and column, and its size, in pixels."""

    row: int
    column: int
    height: int
    width: int


def output_blocks(y_tiles: TileAxis, x_tiles: TileAxis) -> Iterator[OutputBlock]:
    """Iterate over the blocks of a map, row by row."""
    for row in range(0, y_tiles.length, y_tiles.block_size):
        for column in range(0, x_tiles.length, x_tiles.block_size):
            height, width = (
                min(y_tiles.block_size, y_tiles.length - row),
                min(x_tiles.block_size, x_tiles.length - column),
            )
            yield OutputBlock(row, column, height, width)
