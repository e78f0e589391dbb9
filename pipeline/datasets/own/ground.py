"""Ground that chips of different images share, as scenes and tiles that overlap do."""

from collections.abc import Sequence

import numpy as np
import shapely
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.datasets.own.rasters import Picture, to_latlon

# Edges that meet overlap by rounding; more than this share of the smaller chip is ground in both.
_SHARED = 0.01


def overlapping(places: Sequence[tuple[Picture, int, int, int, int]]) -> np.ndarray:
    """Pairs of chips of different pictures that lie on the same ground, as int (pair, 2).

    Args:
        places: of each chip its picture, first row and column, height and width in pixels.
    """
    known = [number for number, (picture, *_) in enumerate(places) if picture.crs]
    if len({places[number][0].paths for number in known}) < 2:
        return np.empty((0, 2), int)
    prints = shapely.polygons(np.stack([_corners(*places[number]) for number in known]))
    one, other = shapely.STRtree(prints).query(prints, predicate="intersects")
    one, other = one[one < other], other[one < other]
    area = shapely.area(prints)
    share = shapely.area(shapely.intersection(prints[one], prints[other])) / np.minimum(area[one], area[other])
    picture = np.unique([str(places[number][0].paths) for number in known], return_inverse=True)[1]
    found = (share > _SHARED) & (picture[one] != picture[other])
    return np.array(known)[np.stack([one[found], other[found]], axis=1)]


def merged(homes: Sequence[str], pairs: np.ndarray) -> np.ndarray:
    """Numbers of blocks, (chip,), where blocks with chips that overlap are one."""
    _, block = np.unique(homes, return_inverse=True)
    count = block.max() + 1
    graph = coo_array((np.ones(len(pairs)), (block[pairs[:, 0]], block[pairs[:, 1]])), shape=(count, count))
    return connected_components(graph, directed=False)[1][block]


def _corners(picture: Picture, row: int, column: int, height: int, width: int) -> np.ndarray:
    """Longitudes and latitudes of a chip's corners, (4, 2)."""
    ends = ((row, column), (row, column + width), (row + height, column + width), (row + height, column))
    x, y = zip(*[picture.place(*end) for end in ends], strict=True)
    lon, lat = map(np.asarray, to_latlon(picture.crs).transform(x, y))
    across = lon.max() - lon.min() > 180
    return np.stack([np.where(across & (lon < 0), lon + 360, lon), lat], axis=1)
