"""Measure wall time and the ratio of two implementations, and save a benchmark's figures."""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(tested: Callable[[], object], reference: Callable[[], object], rounds: int) -> float:
    """Return how many times faster `tested` is: the median over alternating rounds, after one warm-up."""
    tested(), reference()
    return statistics.median(seconds(reference) / seconds(tested) for _ in range(rounds))


def save_results(name: str, figures: Mapping) -> None:
    """Write figures to benchmarks/results/<name>.json with the CPU count and the commit; print them."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent).stdout
    record = {**figures, "commit": commit.strip() or None, "cpus": len(os.sched_getaffinity(0))}
    text = json.dumps(record, indent=2, sort_keys=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
