"""How long work takes, and one way of doing it against another."""

import statistics
import time
from collections.abc import Callable


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> float:
    """How many times faster ours is, as the median over alternating rounds after one warm-up."""
    ours(), theirs()
    return statistics.median(seconds(theirs) / seconds(ours) for _ in range(rounds))
