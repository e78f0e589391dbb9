"""A block of the map: the tiles that reach into it, predicted and blended, a row of tiles at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.data.splits import fill_nodata
from pipeline.mapping.scene import Scene
from pipeline.mapping.signature import Predictor, class_probabilities
from pipeline.mapping.tiling import OutputBlock, TileAxis, blend_window

# No class, and no confidence, where the scene has no data.
NODATA = 255
# Chips that a model sees at once.
BATCH_TILES = 32
# Rows of pixels that are read at once, at least: GDAL decodes JPEG 2000 anew for every window.
READ_ROWS = 512


@dataclass(frozen=True)
class MappingJob:
    """A scene, what maps it, and its tiles.

    Attributes:
        places: of the model's bands among the scene's.
        rows, columns: the tiles along y and x.
    """

    scene: Scene
    predictor: Predictor
    band_indices: tuple[int, ...]
    y_tiles: TileAxis
    x_tiles: TileAxis


def predict_block(job: MappingJob, part: OutputBlock, done: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
    """Classes and confidences of a block, uint8 (band, y, x), `NODATA` where the scene has none.

    One band with the likeliest class and its probability in percent; or, where several classes may hold at once, a
    band a class: whether it holds, and its probability.

    Args:
        done: is told how many tiles were dealt with.
    """
    several = job.predictor.signature.task == "multilabel"
    bands = len(job.predictor.signature.classes) if several else 1
    classes, confidence = (np.full((bands, part.height, part.width), NODATA, np.uint8) for _ in range(2))
    weight = job.x_tiles.weight[part.column : part.column + part.width]
    for row, blended, valid in _rows(job, part, done):
        lines = slice(row - part.row, row - part.row + len(valid))
        blended = blended / (job.y_tiles.weight[row : row + len(valid), None] * weight)
        chosen = blended > 0.5 if several else blended.argmax(axis=0)[None]
        sure = blended if several else blended.max(axis=0)[None]
        classes[:, lines] = np.where(valid, chosen, NODATA)
        confidence[:, lines] = np.where(valid, np.rint(100 * sure), NODATA)
    return classes, confidence


class WindowReader:
    """The scene's pixels for rows of tiles from the top down; several rows of tiles are read at once.

    Attributes:
        starts: columns of the tiles that reach into the block.
    """

    def __init__(self, job: MappingJob, part: OutputBlock):
        self.job, self.starts = job, job.x_tiles.overlapping(part.column, part.column + part.width)
        self.first = self.last = -1

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (band, y, x) of a row of tiles, and where (y, x) they hold data.

        Beyond a scene smaller than a tile they are mirrored.
        """
        tile, scene = self.job.y_tiles.tile, self.job.scene
        column, width = self.starts[0], self.starts[-1] + self.job.x_tiles.tile - self.starts[0]
        if row < self.first or min(row + tile, scene.height) > self.last:
            self.first, self.last = row, min(row + max(READ_ROWS, 2 * tile), scene.height)
            window = (row, column, self.last - row, min(width, scene.width - column))
            self.values, self.valid = scene.read_window(window, self.job.band_indices)
        some = slice(row - self.first, row - self.first + tile)
        values, valid = self.values[:, some], self.valid[some]
        beyond = ((0, tile - valid.shape[0]), (0, width - valid.shape[1]))
        if any(after for _, after in beyond):
            return np.pad(values, ((0, 0), *beyond), mode="symmetric"), np.pad(valid, beyond, mode="symmetric")
        return values, valid


def _rows(
    job: MappingJob, part: OutputBlock, done: Callable[[int], None]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(first row, weighted sums of probabilities (class, y, x), where there is data (y, x)), from the top down.

    Only as many rows are in memory as a tile has.
    """
    tile, last = job.y_tiles.tile, part.row + part.height
    starts, strips = job.y_tiles.overlapping(part.row, last), WindowReader(job, part)
    sums = np.zeros((len(job.predictor.signature.classes), tile, part.width), np.float32)
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        valid = _add_row(job, part, start, strips, sums, done)
        # Rows above the next tiles are complete.
        rows = tile if following is None else following - start
        first, end = max(start, part.row), min(start + rows, last)
        if end > first:
            yield first, sums[:, first - start : end - start], valid[first - start : end - start]
        sums = np.concatenate([sums[:, rows:], np.zeros_like(sums[:, :rows])], axis=1)


def _add_row(job, part: OutputBlock, start: int, strips: WindowReader, sums: np.ndarray, done) -> np.ndarray:
    """Add a row of tiles to the sums, and return where (y, x) the block has data in these rows."""
    tile, starts = job.columns.tile, strips.starts
    values, valid = strips.read(start)
    falling = np.outer(blend_window(job.rows.tile, job.rows.overlap), blend_window(tile, job.columns.overlap))
    full = [place for place in starts if valid[:, place - starts[0] : place - starts[0] + tile].any()]
    done(len(starts) - len(full))
    for some in (full[at : at + BATCH_TILES] for at in range(0, len(full), BATCH_TILES)):
        windows = [slice(place - starts[0], place - starts[0] + tile) for place in some]
        chips = [fill_nodata(values[:, :, one].astype(np.float32), valid[:, one]) for one in windows]
        for place, one in zip(some, _predicted(job, start, some, np.stack(chips)), strict=True):
            left, right = max(place, part.column), min(place + tile, part.column + part.width)
            inside = slice(left - place, right - place)
            one = one[:, :, inside] if one.ndim == 3 else one[:, None, None]
            sums[:, :, left - part.column : right - part.column] += one * falling[:, inside]
        done(len(some))
    first = part.column - starts[0]
    return valid[:, first : first + part.width]


def _predicted(job: MappingJob, row: int, columns: list[int], chips: np.ndarray) -> np.ndarray:
    """Probabilities (batch, class[, y, x]) of tiles of one row."""
    middle = np.asarray(columns) + job.x_tiles.tile / 2
    known = {
        "place": job.scene.latlon(np.full(len(columns), row + job.y_tiles.tile / 2), middle),
        "time": np.full(len(columns), job.scene.time),
    }
    logits = job.predictor.predict_logits(chips, known)
    return class_probabilities(logits, job.predictor.signature.task)
