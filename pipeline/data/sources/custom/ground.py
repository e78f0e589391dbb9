"""Ground that chips of different images share, as scenes and tiles that overlap do."""

from collections.abc import Sequence

import numpy as np
import shapely
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.data.sources.custom.rasters import RasterImage, is_georeferenced, to_latlon

# Edges that meet overlap by rounding; more than this share of the smaller chip is ground in both.
_SHARED = 0.01


# Of a chip its picture, first row and column, height and width in pixels.
Place = tuple[RasterImage, int, int, int, int]


def overlapping_pairs(places: Sequence[Place]) -> np.ndarray:
    """Pairs of chips of different pictures that lie on the same ground, as int (pair, 2)."""
    if len({picture.paths for picture, *_ in places if _placed(picture)}) < 2:
        return np.empty((0, 2), int)
    pairs = overlaps_between(places, places)
    return pairs[pairs[:, 0] < pairs[:, 1]]


def overlaps_between(places: Sequence[Place], others: Sequence[Place]) -> np.ndarray:
    """Pairs of one chip each of two lists, of different pictures, that lie on the same ground, as int (pair, 2).

    Pictures that have a transform and state no system are compared among themselves, as if they had the same.
    """
    found = []
    for system in (True, False):
        ours = _footprints(places, system)
        theirs = ours if others is places else _footprints(others, system)
        for turn in (0, 360, -360) if system else (0,):
            found.append(_pairs(places, ours, others, theirs, turn))
    return np.unique(np.concatenate(found), axis=0)


def _pairs(places: Sequence[Place], ours: tuple, others: Sequence[Place], theirs: tuple, turn: int) -> np.ndarray:
    """Such pairs of two lists and their footprints, the second moved by so many degrees of longitude."""
    (mine, prints), (theirs, more) = ours, theirs
    if turn and len(more):  # chips that reach over the antimeridian meet those beyond it there
        bounds = shapely.bounds(more)
        farthest = np.abs(shapely.bounds(prints)).max(initial=0)
        across = (bounds[:, 2] >= 180) | (bounds[:, 0] <= -180) | (farthest >= 180)
        theirs, more = theirs[across], shapely.transform(more[across], lambda points: points + np.array((turn, 0)))
    if not len(mine) or not len(theirs):
        return np.empty((0, 2), int)
    one, other = shapely.STRtree(more).query(prints, predicate="intersects")
    called = [np.array([str(each[number][0].paths) for number in some]) for each, some in
              ((places, mine), (others, theirs))]  # fmt: skip
    apart = called[0][one] != called[1][other]
    one, other = one[apart], other[apart]
    smaller = np.minimum(shapely.area(prints[one]), shapely.area(more[other]))
    found = shapely.area(shapely.intersection(prints[one], more[other])) > _SHARED * smaller
    return np.stack([mine[one[found]], theirs[other[found]]], axis=1)


def _placed(picture: RasterImage) -> bool:
    return bool(picture.crs) or is_georeferenced(picture.transform, picture.height)


def _footprints(places: Sequence[Place], system: bool) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the chips that have a place, with or without a system, and their footprints."""
    numbers = [at for at, (picture, *_) in enumerate(places) if _placed(picture) and bool(picture.crs) == system]
    # Images that all lie at one place, without a system, lie at none.
    if not numbers or (not system and len({places[number][0].transform for number in numbers}) == 1):
        return np.empty(0, int), np.empty(0, object)
    return np.array(numbers), shapely.polygons(np.stack([_corners(*places[number]) for number in numbers]))


def merge_blocks(homes: Sequence[str], pairs: np.ndarray) -> np.ndarray:
    """Numbers of blocks, (chip,), where blocks with chips that overlap are one."""
    _, block = np.unique(homes, return_inverse=True)
    count = block.max() + 1
    graph = coo_array((np.ones(len(pairs)), (block[pairs[:, 0]], block[pairs[:, 1]])), shape=(count, count))
    return connected_components(graph, directed=False)[1][block]


def _corners(picture: RasterImage, row: int, column: int, height: int, width: int) -> np.ndarray:
    """Longitudes and latitudes of a chip's corners, (4, 2), in one piece; or x and y where it states no system."""
    ends = ((row, column), (row, column + width), (row + height, column + width), (row + height, column))
    x, y = zip(*[picture.xy(*end) for end in ends], strict=True)
    if not picture.crs:
        return np.stack([x, y], axis=1)
    lon, lat = map(np.asarray, to_latlon(picture.crs).transform(x, y))
    across = lon.max() - lon.min() > 180
    lon = np.where(across & (lon < 0), lon + 360, lon)
    return np.stack([lon - 360 * np.floor((lon.mean() + 180) / 360), lat], axis=1)
