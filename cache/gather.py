"""Rows of several arrays into memory, side by side."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from cache.arrays import DequantizedArray, LocalArray
from cache.files import max_open_files
from cache.remote import RemoteArray

THREADS = 4
# Below this many bytes for each thread a batch is read by fewer.
_SMALL = 1 << 20
_CORES = os.cpu_count() or 1
# Rows of each array in a batch that are asked whether they are in the page cache.
_ASKED = 2

# Rows of an array, which of them, and where they go.
Part = tuple[LocalArray | RemoteArray | DequantizedArray, list[int], np.ndarray]


def gather(parts: Sequence[Part], pool: ThreadPoolExecutor) -> bool:
    """Read the rows of every part, side by side.

    Returns:
        Whether some of them had to come from the disk, as far as a few can tell.
    """
    cold = False
    count = len(parts[0][1])
    step = max(1, max_open_files() // 2 // len(parts))  # each row may be in a file of its own
    for first in range(0, count, step):
        some = slice(first, first + step)
        cold |= _gather([(rows, index[some], out[some]) for rows, index, out in parts], pool)
    return cold


def _gather(parts: Sequence[Part], pool: ThreadPoolExecutor) -> bool:
    # Found by one thread, since two would wait for each other's lock longer than finding takes.
    found = [(rows, rows.locate(index), out) for rows, index, out in parts]
    cold = not all(rows.in_page_cache(place) for rows, places, _ in found for place in places[:_ASKED])
    if cold:
        for rows, places, _ in found:
            rows.prefetch(places)
    count, size = len(found[0][1]), sum(out.nbytes for _, _, out in found)
    threads = THREADS if cold else min(THREADS, _CORES, 1 + size // _SMALL)
    bounds = [count * number // threads for number in range(threads + 1)]

    def share(start: int, stop: int) -> None:
        for rows, places, out in found:
            if start < stop:
                rows.read(places[start:stop], out[start:stop])

    others = [pool.submit(share, *pair) for pair in pairwise(bounds[1:])]
    share(*bounds[:2])
    for other in others:
        other.result()
    return cold
