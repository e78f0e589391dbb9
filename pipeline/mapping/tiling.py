"""Tiles and blocks of a map: divide a scene, predict the tiles of a block, and blend them row by row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from rasterio.windows import Window

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


@dataclass(frozen=True)
class TileAxis:
    """Tiles along one side of a scene, in pixels. A tile may exceed the scene, which is then padded."""

    length: int
    tile: int
    overlap: int
    starts: np.ndarray  # first pixels of the tiles, int (tile,)
    weight: np.ndarray  # sum of the tiles' blend weights at every pixel, float32 (length,)

    def overlapping(self, first: int, length: int) -> np.ndarray:
        """Return the starts of the tiles that have pixels in [first, first + length)."""
        return self.starts[(self.starts + self.tile > first) & (self.starts < first + length)]


def tile_axis(length: int, tile: int, overlap: int) -> TileAxis:
    """Place tiles from pixel 0 on; the last one is moved back to end with the scene."""
    starts = np.arange(0, max(length - tile, 0) + 1, tile - overlap)
    if starts[-1] + tile < length:
        starts = np.append(starts, length - tile)
    weight = np.zeros(max(length, tile), np.float32)
    for start in starts:
        weight[start : start + tile] += blend_window(tile, overlap)
    return TileAxis(length, tile, overlap, starts, weight[:length])


def blend_window(tile: int, overlap: int) -> np.ndarray:
    """Compute the blend weights of a tile along one side, float32 (tile,).

    They are 1 inside and fall over the overlap as a squared sine (Tukey window), so that two tiles sum to 1 at their
    seam. They are never 0, since a pixel at the edge of a scene has a single tile.
    """
    rise = np.sin(np.pi / 2 * (np.arange(overlap) + 0.5) / max(overlap, 1)) ** 2
    return np.concatenate([rise, np.ones(tile - 2 * overlap), rise[::-1]]).astype(np.float32)


def output_blocks(y_tiles: TileAxis, x_tiles: TileAxis) -> Iterator[Window]:
    """Yield the blocks of a map, of whole GeoTIFF tiles, row by row."""
    height, width = (
        -(-MIN_BLOCK_STRIDES * (axis.tile - axis.overlap) // COG_TILE) * COG_TILE for axis in (y_tiles, x_tiles)
    )
    for row in range(0, y_tiles.length, height):
        for column in range(0, x_tiles.length, width):
            yield Window(column, row, min(width, x_tiles.length - column), min(height, y_tiles.length - row))


@dataclass(frozen=True)
class MappingJob:
    """A scene, the model that maps it, the model's bands in the scene, and the tiles along y and x."""

    scene: Scene
    predictor: Predictor
    band_indices: tuple[int, ...]
    y_tiles: TileAxis
    x_tiles: TileAxis


def predict_block(
    job: MappingJob, block: Window, on_progress: Callable[[int], object]
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the classes and confidences of a block, uint8 (band, y, x), `NODATA` where data is missing.

    There is one band, with the most probable class and its probability in percent. Multi-label models have one band
    per class instead: whether it is present (0 or 1), and its probability in percent. Only one row of tiles is in
    memory. `on_progress` is called with the number of tiles that were finished.
    """
    signature, tile, block_end = job.predictor.signature, job.y_tiles.tile, block.row_off + block.height
    n_classes = len(signature.class_names)
    shape = (n_classes if signature.task.is_multilabel else 1, block.height, block.width)
    classes, confidence = np.full(shape, NODATA, np.uint8), np.full(shape, NODATA, np.uint8)
    row_starts = job.y_tiles.overlapping(block.row_off, block.height)
    column_starts = job.x_tiles.overlapping(block.col_off, block.width)
    x_weight = job.x_tiles.weight[block.col_off : block.col_off + block.width]
    columns = slice(block.col_off - column_starts[0], block.col_off - column_starts[0] + block.width)
    sums = np.zeros((n_classes, tile, block.width), np.float32)
    for row, next_row, (values, is_valid) in zip(
        row_starts, [*row_starts[1:], row_starts[-1] + tile], _read_rows(job, row_starts, column_starts), strict=True
    ):
        _add_row_of_tiles(job, block, row, values, is_valid, sums)
        on_progress(len(column_starts))
        # Rows above the next tiles are complete.
        first, end = max(row, block.row_off), min(next_row, block_end)
        if end > first:
            probability = sums[:, first - row : end - row] / (job.y_tiles.weight[first:end, None] * x_weight)
            has_data = is_valid[first - row : end - row, columns]
            lines = slice(first - block.row_off, end - block.row_off)
            if signature.task.is_multilabel:
                predicted, percent = probability > 0.5, 100 * probability
            else:
                predicted, percent = probability.argmax(axis=0), 100 * probability.max(axis=0)
            classes[:, lines] = np.where(has_data, predicted, NODATA)
            confidence[:, lines] = np.where(has_data, np.rint(percent), NODATA)
        n_rows = next_row - row
        sums = np.concatenate([sums[:, n_rows:], np.zeros_like(sums[:, :n_rows])], axis=1)
    return classes, confidence


def _read_rows(
    job: MappingJob, row_starts: np.ndarray, column_starts: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read rows of tiles, several at a time: pixels (band, y, x), and where (y, x) they have data.

    A scene smaller than a tile is padded by its mirror image.
    """
    tile, scene, end = job.y_tiles.tile, job.scene, 0
    column, width = column_starts[0], column_starts[-1] + job.x_tiles.tile - column_starts[0]
    for row in row_starts:
        if row + tile > end:
            first, end = row, row + max(READ_ROWS, 2 * tile)
            height, available = min(end, scene.height) - row, min(width, scene.width - column)
            values, is_valid = scene.read_window(Window(column, row, available, height), job.band_indices)
            if height < tile or available < width:
                padding = ((0, max(tile - height, 0)), (0, width - available))
                values = np.pad(values, ((0, 0), *padding), mode="symmetric")
                is_valid = np.pad(is_valid, padding, mode="symmetric")
        yield values[:, row - first : row - first + tile], is_valid[row - first : row - first + tile]


def _add_row_of_tiles(
    job: MappingJob, block: Window, row: int, values: np.ndarray, is_valid: np.ndarray, sums: np.ndarray
) -> None:
    """Predict the tiles with data in a row; add their weighted probabilities to `sums` (class, y, x)."""
    x_tiles, y_tiles, predictor = job.x_tiles, job.y_tiles, job.predictor
    tile, block_end = x_tiles.tile, block.col_off + block.width
    weight = np.outer(blend_window(y_tiles.tile, y_tiles.overlap), blend_window(tile, x_tiles.overlap))
    starts = x_tiles.overlapping(block.col_off, block.width)
    windows = {start: slice(start - starts[0], start - starts[0] + tile) for start in starts}
    with_data = [start for start, window in windows.items() if is_valid[:, window].any()]
    for first in range(0, len(with_data), BATCH_TILES):
        batch = with_data[first : first + BATCH_TILES]
        slices = [windows[start] for start in batch]
        chips = [fill_nodata(values[:, :, x].astype(np.float32), is_valid[:, x]) for x in slices]
        rows, columns = np.full(len(batch), row + y_tiles.tile / 2), np.asarray(batch) + tile / 2
        metadata = {"location": job.scene.latlon(rows, columns), "time": np.full(len(batch), job.scene.time)}
        logits = predictor.predict_logits(np.stack(chips), metadata)
        for start, probability in zip(batch, predictor.signature.task.probabilities(logits, axis=1), strict=True):
            left, right = max(start, block.col_off), min(start + tile, block_end)
            inside = slice(left - start, right - start)
            per_pixel = probability[:, :, inside] if probability.ndim == 3 else probability[:, None, None]
            sums[:, :, left - block.col_off : right - block.col_off] += per_pixel * weight[:, inside]
