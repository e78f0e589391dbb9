"""Chips on a grid, assignment of spatial blocks to splits, and overlap of chips from different images."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from pyproj import CRS, Transformer
from rasterio import Affine
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.config import SplitFractions
from pipeline.errors import UserError

# Two chips overlap if they share more than this fraction of the smaller one; less is rounding at common edges.
MIN_OVERLAP = 0.01
# Random assignments tried, times the number of blocks: with ten thousand blocks, fewer than 20,000 suffice.
DRAWS_TIMES_BLOCKS = 4_000_000
MIN_DRAWS, MAX_DRAWS = 200, 20000
# Indices of chips, their images, and their polygons, each (chip,).
Polygons = tuple[np.ndarray, np.ndarray, np.ndarray]


# Chips


def chip_corners(height: int, width: int, chip_size: int) -> np.ndarray:
    """Upper left corners (row, column) of the whole, non-overlapping chips of an image, as int (chip, 2)."""
    rows, columns = np.arange(height // chip_size) * chip_size, np.arange(width // chip_size) * chip_size
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)


def crop(image: np.ndarray, corner: Sequence[int] | np.ndarray, chip_size: int) -> np.ndarray:
    """Crop a chip (…, chip_size, chip_size) from an image (…, y, x)."""
    row, column = corner
    return image[..., row : row + chip_size, column : column + chip_size]


def fill_nodata(chip: np.ndarray, is_valid: np.ndarray) -> np.ndarray:
    """Replace invalid pixels of a chip (band, y, x) by the mean of each band over the valid pixels (y, x)."""
    if is_valid.all():
        return chip
    mean = chip.mean(axis=(1, 2), where=is_valid, keepdims=True)
    return np.where(is_valid, chip, mean if chip.dtype.kind == "f" else np.rint(mean)).astype(chip.dtype)


# Spatial blocks


def assign_blocks_to_splits(class_areas: np.ndarray, splits: SplitFractions, seed: int) -> np.ndarray:
    """Return the index in `SPLITS` of every block, (block,); all splits have similar class shares.

    The result is the best of many random assignments: the one whose largest relative deviation of a class share
    from the requested fraction is smallest. It depends on labels only, never on the score of a model.

    Args:
        class_areas: area of each class in each block, (block, class), in pixels or other whole numbers: their sums
            are exact on every machine.
        splits: fractions of the blocks.

    Raises UserError for too few blocks for three splits.
    """
    fractions = np.array([splits.train, splits.val, splits.test])
    n_blocks = len(class_areas)
    sizes = np.maximum(np.round(fractions * n_blocks).astype(int), 1)
    sizes[0] = n_blocks - sizes[1:].sum()
    if sizes[0] < 1:
        raise UserError(
            f"{n_blocks} spatial blocks cannot fill three splits. Give a smaller 'block' to the dataset, or more "
            "images.",
            key="block", value=n_blocks,
        )  # fmt: skip
    split_of_block, generator = np.repeat(np.arange(3), sizes), np.random.default_rng(seed)
    draws = np.empty((np.clip(DRAWS_TIMES_BLOCKS // n_blocks, MIN_DRAWS, MAX_DRAWS), n_blocks), np.int8)
    for draw in draws:
        generator.shuffle(split_of_block)
        draw[:] = split_of_block
    areas = class_areas.astype(float)
    batches = np.array_split(draws, -(-draws.size // DRAWS_TIMES_BLOCKS))  # so that memory is bounded
    split_areas = [np.stack([(batch == split) @ areas for split in range(3)], axis=1) for batch in batches]
    shares = np.concatenate(split_areas) / np.maximum(areas.sum(axis=0), 1e-9)
    deviation = (np.abs(shares - fractions[:, None]) / fractions[:, None]).max(axis=(1, 2))
    return draws[deviation.argmin()]


def merge_blocks(block_ids: Sequence[str], pairs: np.ndarray) -> np.ndarray:
    """Number the blocks of chips, (chip,); blocks with overlapping chips (pair, 2) become one."""
    _, block = np.unique(block_ids, return_inverse=True)
    count = block.max() + 1
    graph = coo_array((np.ones(len(pairs)), (block[pairs[:, 0]], block[pairs[:, 1]])), shape=(count, count))
    return connected_components(graph, directed=False)[1][block]


# Overlap


@dataclass(frozen=True)
class Footprint:
    """Location of a chip, whose corner and size are in pixels of its image.

    Attributes:
        image: paths of its image, which identify it.
        crs: of the image, as WKT; empty if it states none.
        transform: from (column, row) to the CRS; None if the image is not georeferenced.
    """

    image: tuple[str, ...]
    crs: str
    transform: Affine | None
    row: int
    column: int
    height: int
    width: int

    def polygon_corners(self) -> np.ndarray:
        """Longitude and latitude of the four corners, (4, 2); x and y if there is no CRS.

        A chip across the antimeridian has longitudes beyond ±180°, so that its corners form one polygon.
        """
        rows = self.row + self.height * np.array([0, 0, 1, 1])
        columns = self.column + self.width * np.array([0, 1, 1, 0])
        x, y = (self.transform or Affine.identity()) @ (columns, rows)
        if not self.crs:
            return np.stack([x, y], axis=1)
        lon, lat = map(np.asarray, to_latlon(self.crs).transform(x, y))
        crosses_antimeridian = lon.max() - lon.min() > 180
        lon = np.where(crosses_antimeridian & (lon < 0), lon + 360, lon)
        return np.stack([lon - 360 * np.floor((lon.mean() + 180) / 360), lat], axis=1)


def overlapping_pairs(footprints: Sequence[Footprint]) -> np.ndarray:
    """Indices of chips of different images that overlap on the ground, as int (pair, 2)."""
    if len({chip.image for chip in footprints if chip.transform is not None}) < 2:
        return np.empty((0, 2), int)
    pairs = overlaps_between(footprints, footprints)
    return pairs[pairs[:, 0] < pairs[:, 1]]


def overlaps_between(a: Sequence[Footprint], b: Sequence[Footprint]) -> np.ndarray:
    """Indices (in a, in b) of chips of different images that overlap on the ground, as int (pair, 2).

    Images with a transform and without a CRS are compared among themselves, as if they had the same CRS.
    """
    pairs = []
    for has_crs in (True, False):
        polygons_a = _polygons(a, has_crs)
        polygons_b = polygons_a if b is a else _polygons(b, has_crs)
        # Chips on both sides of the antimeridian are compared after a shift by 360 degrees.
        pairs += [_intersecting(polygons_a, polygons_b, shift) for shift in ((0, 360, -360) if has_crs else (0,))]
    return np.unique(np.concatenate(pairs), axis=0)


@functools.cache
def to_latlon(crs: str) -> Transformer:
    """Transformer from a CRS, as WKT, to longitude and latitude (WGS 84)."""
    return Transformer.from_crs(CRS.from_wkt(crs), "EPSG:4326", always_xy=True)


def _polygons(footprints: Sequence[Footprint], has_crs: bool) -> Polygons:
    """Return the polygons of the georeferenced chips with, or without, a CRS."""
    indices = [
        index for index, chip in enumerate(footprints) if chip.transform is not None and bool(chip.crs) == has_crs
    ]
    # If all images without a CRS have the same transform, it does not locate them.
    if not indices or (not has_crs and len({footprints[index].transform for index in indices}) == 1):
        return np.empty(0, int), np.empty(0, object), np.empty(0, object)
    images = np.array([str(footprints[index].image) for index in indices])
    shapes = shapely.polygons(np.stack([footprints[index].polygon_corners() for index in indices]))
    return np.array(indices), images, shapes


def _intersecting(a: Polygons, b: Polygons, shift: int) -> np.ndarray:
    """Indices of overlapping chips, int (pair, 2), with b moved by `shift` degrees of longitude."""
    (indices_a, images_a, shapes_a), (indices_b, images_b, shapes_b) = a, b
    if shift and len(shapes_b):
        bounds = shapely.bounds(shapes_b)
        farthest = np.abs(shapely.bounds(shapes_a)).max(initial=0)
        crosses = (bounds[:, 2] >= 180) | (bounds[:, 0] <= -180) | (farthest >= 180)
        indices_b, images_b = indices_b[crosses], images_b[crosses]
        shapes_b = shapely.transform(shapes_b[crosses], lambda points: points + np.array((shift, 0)))
    if not len(indices_a) or not len(indices_b):
        return np.empty((0, 2), int)
    left, right = shapely.STRtree(shapes_b).query(shapes_a, predicate="intersects")
    different = images_a[left] != images_b[right]
    left, right = left[different], right[different]
    smaller = np.minimum(shapely.area(shapes_a[left]), shapely.area(shapes_b[right]))
    overlap = shapely.area(shapely.intersection(shapes_a[left], shapes_b[right])) > MIN_OVERLAP * smaller
    return np.stack([indices_a[left[overlap]], indices_b[right[overlap]]], axis=1)
