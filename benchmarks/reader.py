"""Random minibatches from the feature store, against other ways to read the same values.

    python -m benchmarks.reader

Needs the extra `bench` for tensorstore, litdata and webdataset; without one its fields are null. Rates are samples a
second, medians over alternating rounds; a ratio is the median over rounds of our rate over theirs.
"""

import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import peers
from benchmarks.features import store
from benchmarks.peers import BATCH, PEERS, Way
from cache.loader import FeatureDataset, shuffled_batches
from cache.reader import FeatureStore

ROUNDS = 5
MANY = 15  # where the two are so near each other that a median of few rounds says little
SECONDS = 1.0  # a slow way reads fewer batches
LEAST = 2


def rate(way: Way, order: list[np.ndarray]) -> float:
    """Samples a second; the first batch, with what a way needs to start, is not counted."""
    batches = way(order)
    next(batches)
    begun = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * BATCH / (time.perf_counter() - begun)


def rates(
    ways: dict[str, Way],
    features: FeatureStore,
    prepare: Callable[[str], None] = lambda name: None,
    least: int = LEAST,
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
) -> dict:
    """Rates of every way and round, the ways by turns, each round in another random order of samples."""
    rows = np.arange(len(features.sample))
    counts, measured = {}, {name: [] for name in ways}
    for number in range(-2, rounds):  # two rounds to warm up and to find how many batches a way can do in time
        order = [index for index in shuffled_batches(rows, BATCH, seed=0, epoch=number + 2) if len(index) == BATCH]
        for name, way in ways.items():
            prepare(name)
            found = rate(way, order[: 1 + counts.get(name, least)])
            counts[name] = (
                int(np.clip(seconds * found / BATCH, least, len(order) - 1)) if number < 0 else counts[name]
            )
            if number >= 0:
                measured[name].append(found)
    return measured


def ratio(measured: dict, ours: str, *theirs: str) -> float | None:
    """How many times faster than the best of others; None where none was measured."""
    there = [measured[name] for name in theirs if name in measured]
    if not there:
        return None
    return round(statistics.median(mine / max(other) for mine, *other in zip(measured[ours], *there, strict=True)), 3)


def warm(features: FeatureStore) -> dict[str, dict]:
    """Ours beside each peer, by peer: one at a time, so that the page cache holds the files of both."""
    measured = {}
    for peer in ("memmap", "pread", "memory", "zarr", "tensorstore", "litdata", "webdataset"):
        if importlib.util.find_spec(peer) or peer in ("memmap", "pread", "memory"):
            make = getattr(peers, f"{peer}_ways")
            # Opened anew, so that nothing stays mapped from one peer to the next.
            ways = {"ours": _ours(FeatureStore(features.location))} | make(FeatureStore(features.location))
            rounds = MANY if peer == "memmap" else ROUNDS
            measured[peer] = rates(ways, features, partial(_warm, features, peer), rounds=rounds)
    bounded = {"ours_mapped_256_mib": _ours(FeatureStore(features.location, max_mapped_bytes=256 << 20))}
    measured["mapped"] = rates(bounded | peers.memmap_ways(features), features, partial(_warm, features, "memmap"))
    return measured


def _warm(features: FeatureStore, peer: str, name: str) -> None:
    """Bring the files of a way into the page cache; some machines take it back within seconds."""
    own = peer in ("memmap", "litdata", "webdataset") and not name.startswith("ours")
    for path in PEERS.glob(f"{peer}/*") if own else Path(features.location).rglob("c.*"):
        path.read_bytes()


def _ours(features: FeatureStore) -> Way:
    batches = FeatureDataset({level: [(features, f"{level}/features")] for level in features.levels})
    return batches.stream


def cold(features: FeatureStore) -> dict:
    """Ours and the memory map, opened anew, with their files dropped from the page cache before every reading.

    A few batches only: reading ahead wastes what it reads at first, and later finds it in the cache.
    """
    places = {"ours": Path(features.location), "memmap": PEERS / "memmap"}

    def drop(name):
        for path in [*places[name].rglob("c.*"), *places[name].glob("*.npy")]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    ways = {
        "ours": lambda order: _ours(FeatureStore(features.location))(order),
        "memmap": lambda order: peers.memmap_ways(features)["memmap"](order),
    }
    return rates(ways, features, drop, least=8, seconds=0)


def fused(first: FeatureStore, second: FeatureStore) -> dict:
    """Two stores into one batch, against the same reader into two batches which are then concatenated.

    `concatenated` makes new arrays as numpy and torch do unless told otherwise; `in_place` reuses memory;
    `overlapped` does that too, and concatenates while the prefetch thread reads on, on a core that is idle here.
    """
    levels = first.levels
    into_one = FeatureDataset({level: [(one, f"{level}/features") for one in (first, second)] for level in levels})
    apart = FeatureDataset({
        f"{level}-{number}": [(one, f"{level}/features")]
        for level in levels for number, one in enumerate((first, second))
    })  # fmt: skip
    out, parts = into_one.allocate(BATCH), apart.allocate(BATCH)

    def join(batch, out):
        for level in levels:
            np.concatenate([batch[f"{level}-0"], batch[f"{level}-1"]], axis=1, out=out[level])
        return out

    def concatenated(order):
        for index in order:
            batch = apart.get(index, parts)
            yield [np.concatenate([batch[f"{level}-0"], batch[f"{level}-1"]], axis=1) for level in levels]

    ways = {
        "fused": lambda order: (into_one.get(index, out) for index in order),
        "concatenated": concatenated,
        "concatenated_in_place": lambda order: (join(apart.get(index, parts), out) for index in order),
        "fused_overlapped": into_one.stream,
        "concatenated_overlapped": lambda order: (join(batch, out) for _, batch in apart.stream(order)),
    }
    return rates(ways, first, rounds=MANY)


def main() -> None:
    features = store("sample-trees", "lite0", 224, 6)
    size = sum(path.stat().st_size for path in Path(features.location).rglob("c.*"))
    assert size >= 2e9, f"{size} bytes of features are too few"
    measured, chilled = warm(features), cold(features)
    joined = fused(store("sample-landuse", "csmask_b4", 128, 2), store("sample-landuse", "lite0", 128, 2))

    def against(peer):
        """Ours over the best of a peer's ways."""
        ways = measured.get(peer, {})
        return ratio(ways, "ours", *[name for name in ways if not name.startswith("ours")])

    def medians(rates):
        return {name: round(statistics.median(each)) for name, each in rates.items()}

    print(json.dumps({
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "gigabytes": round(size / 1e9, 2), "samples": len(features.sample), "batch": BATCH, "rounds": [ROUNDS, MANY],
        "rates": {peer: medians(ways) for peer, ways in measured.items()},
        "cold_rates": medians(chilled), "fused_rates": medians(joined),
        "vs_memmap": against("memmap"), "vs_pread": against("pread"), "vs_memory": against("memory"),
        "mapped_256_mib_vs_memmap": ratio(measured["mapped"], "ours_mapped_256_mib", "memmap"),
        "vs_zarr_python": against("zarr"),
        "vs_tensorstore": against("tensorstore"), "vs_litdata": against("litdata"),
        "vs_webdataset": against("webdataset"),
        "cold_vs_memmap": ratio(chilled, "ours", "memmap"),
        "fused_vs_concat": ratio(joined, "fused", "concatenated"),
        "fused_vs_concat_in_place": ratio(joined, "fused", "concatenated_in_place"),
        "fused_vs_concat_overlapped": ratio(joined, "fused_overlapped", "concatenated_overlapped"),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
