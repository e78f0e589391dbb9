"""Tiles and blocks of a map: divide a scene, predict the tiles of a block, and blend them row by row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.data.splits import fill_nodata
from pipeline.mapping.predictors import Predictor
from pipeline.mapping.scene import Scene

# Side in pixels of the tiles of the GeoTIFF. Blocks consist of whole ones.
COG_TILE = 512
# Smallest side of a block in strides of the prediction tiles. Tiles across the edge of a block are predicted for both
# blocks, so smaller blocks take longer.
MIN_BLOCK_STRIDES = 16
# Tiles per forward pass.
BATCH_TILES = 32
# Rows of pixels that are read together, at least: GDAL decodes JPEG 2000 again for every window.
READ_ROWS = 512
# Class and confidence of pixels where the scene has no data.
NODATA = 255


# Tiles and blocks


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


# Prediction of a block


@dataclass(frozen=True)
class MappingJob:
    """A scene, the model that maps it, and the tiles.

    Attributes:
        band_indices: indices of the model's bands in the scene.
        y_tiles, x_tiles: tiles along y and x.
    """

    scene: Scene
    predictor: Predictor
    band_indices: tuple[int, ...]
    y_tiles: TileAxis
    x_tiles: TileAxis


def predict_block(
    job: MappingJob, block: OutputBlock, on_progress: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the classes and confidences of a block.

    There is one band, with the most probable class and its probability in percent. Multi-label models have one band
    per class instead: whether it is present (0 or 1), and its probability in percent.

    Args:
        on_progress: is called with the number of tiles that were finished.

    Returns:
        Classes and confidences, uint8 (band, y, x), `NODATA` where the scene has no data.
    """
    signature = job.predictor.signature
    n_bands = len(signature.class_names) if signature.task.is_multilabel else 1
    classes, confidence = (np.full((n_bands, block.height, block.width), NODATA, np.uint8) for _ in range(2))
    x_weight = job.x_tiles.weight[block.column : block.column + block.width]
    for row, weighted_sum, is_valid in _blend_rows(job, block, on_progress):
        lines = slice(row - block.row, row - block.row + len(is_valid))
        probability = weighted_sum / (job.y_tiles.weight[row : row + len(is_valid), None] * x_weight)
        if signature.task.is_multilabel:
            predicted, percent = probability > 0.5, 100 * probability
        else:
            predicted, percent = probability.argmax(axis=0)[None], 100 * probability.max(axis=0)[None]
        classes[:, lines] = np.where(is_valid, predicted, NODATA)
        confidence[:, lines] = np.where(is_valid, np.rint(percent), NODATA)
    return classes, confidence


class WindowReader:
    """Read the pixels of rows of tiles, from the top down. Several rows of tiles are read together.

    Attributes:
        starts: first columns of the tiles that overlap the block.
    """

    def __init__(self, job: MappingJob, block: OutputBlock):
        self.job, self.starts = job, job.x_tiles.overlapping(block.column, block.column + block.width)
        self.first = self.last = -1

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the pixels (band, y, x) of a row of tiles, and where (y, x) they have data.

        A scene smaller than a tile is padded by its mirror image.
        """
        tile, scene = self.job.y_tiles.tile, self.job.scene
        column, width = self.starts[0], self.starts[-1] + self.job.x_tiles.tile - self.starts[0]
        if row < self.first or min(row + tile, scene.height) > self.last:
            self.first, self.last = row, min(row + max(READ_ROWS, 2 * tile), scene.height)
            window = (row, column, self.last - row, min(width, scene.width - column))
            self.values, self.is_valid = scene.read_window(window, self.job.band_indices)
        lines = slice(row - self.first, row - self.first + tile)
        values, is_valid = self.values[:, lines], self.is_valid[lines]
        padding = ((0, tile - is_valid.shape[0]), (0, width - is_valid.shape[1]))
        if any(after for _, after in padding):
            return np.pad(values, ((0, 0), *padding), mode="symmetric"), np.pad(is_valid, padding, mode="symmetric")
        return values, is_valid


def _blend_rows(
    job: MappingJob, block: OutputBlock, on_progress: Callable[[int], None]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Iterate over finished rows of a block, from the top down; only one row of tiles is in memory.

    Yields:
        The first row, the weighted sums of probabilities (class, y, x), and where (y, x) the scene has data.
    """
    tile, end_of_block = job.y_tiles.tile, block.row + block.height
    starts, reader = job.y_tiles.overlapping(block.row, end_of_block), WindowReader(job, block)
    sums = np.zeros((len(job.predictor.signature.class_names), tile, block.width), np.float32)
    for start, next_start in zip(starts, [*starts[1:], None], strict=True):
        is_valid = _add_row_of_tiles(job, block, start, reader, sums, on_progress)
        # Rows above the next tiles are complete.
        n_rows = tile if next_start is None else next_start - start
        first, end = max(start, block.row), min(start + n_rows, end_of_block)
        if end > first:
            yield first, sums[:, first - start : end - start], is_valid[first - start : end - start]
        sums = np.concatenate([sums[:, n_rows:], np.zeros_like(sums[:, :n_rows])], axis=1)


def _add_row_of_tiles(
    job: MappingJob,
    block: OutputBlock,
    row: int,
    reader: WindowReader,
    sums: np.ndarray,
    on_progress: Callable[[int], None],
) -> np.ndarray:
    """Add a row of tiles to `sums`; return where (y, x) the block has data in its rows."""
    tile, starts = job.x_tiles.tile, reader.starts
    values, is_valid = reader.read(row)
    weight = np.outer(blend_window(job.y_tiles.tile, job.y_tiles.overlap), blend_window(tile, job.x_tiles.overlap))
    with_data = [start for start in starts if is_valid[:, start - starts[0] : start - starts[0] + tile].any()]
    on_progress(len(starts) - len(with_data))
    for first in range(0, len(with_data), BATCH_TILES):
        columns = with_data[first : first + BATCH_TILES]
        windows = [slice(column - starts[0], column - starts[0] + tile) for column in columns]
        chips = [fill_nodata(values[:, :, window].astype(np.float32), is_valid[:, window]) for window in windows]
        probabilities = _predict_tiles(job, row, columns, np.stack(chips))
        for column, probability in zip(columns, probabilities, strict=True):
            left, right = max(column, block.column), min(column + tile, block.column + block.width)
            inside = slice(left - column, right - column)
            per_pixel = probability[:, :, inside] if probability.ndim == 3 else probability[:, None, None]
            sums[:, :, left - block.column : right - block.column] += per_pixel * weight[:, inside]
        on_progress(len(columns))
    offset = block.column - starts[0]
    return is_valid[:, offset : offset + block.width]


def _predict_tiles(job: MappingJob, row: int, columns: list[int], chips: np.ndarray) -> np.ndarray:
    """Predict tiles of one row: probabilities (batch, class) or (batch, class, y, x)."""
    centres = np.asarray(columns) + job.x_tiles.tile / 2
    metadata = {
        "location": job.scene.latlon(np.full(len(columns), row + job.y_tiles.tile / 2), centres),
        "time": np.full(len(columns), job.scene.time),
    }
    logits = job.predictor.predict_logits(chips, metadata)
    return job.predictor.signature.task.probabilities(logits, axis=1)
