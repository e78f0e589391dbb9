"""Measure wall time, and the ratio of two implementations."""

import statistics
import time
from collections.abc import Callable


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(tested: Callable[[], object], reference: Callable[[], object], rounds: int) -> float:
    """Return how many times faster `tested` is: the median over alternating rounds, after one warm-up."""
    tested(), reference()
    return statistics.median(seconds(reference) / seconds(tested) for _ in range(rounds))
