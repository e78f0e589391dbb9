"""Random minibatches from the feature store, compared with other readers of the same values.

    python -m benchmarks.reader

Needs the extra `bench` for tensorstore, litdata and webdataset; without it their fields are null. Rates are samples
per second, medians over alternating rounds. A ratio is the median over rounds of our rate divided by the other's.
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
from benchmarks.features import feature_store
from benchmarks.peers import BATCH, PEERS, Reader
from cache.loader import FeatureDataset, shuffled_batches
from cache.reader import FeatureStore
from cache.schema import level_array

ROUNDS = 5
ROUNDS_OF_SIMILAR = 15  # the median of few rounds is uncertain where two readers are almost equally fast
SECONDS = 1.0  # of a round, so that a slow reader reads fewer batches
MIN_BATCHES = 2
BUILT_IN = ("memmap", "pread", "memory")


def samples_per_second(reader: Reader, order: list[np.ndarray]) -> float:
    """Return the rate of a reader without its first batch, which includes its start."""
    batches = reader(order)
    next(batches)
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * BATCH / (time.perf_counter() - start)


def measure_rates(
    readers: dict[str, Reader],
    features: FeatureStore,
    prepare: Callable[[str], None] = lambda name: None,
    min_batches: int = MIN_BATCHES,
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
) -> dict[str, list[float]]:
    """Return the rates of every reader in all rounds; readers alternate.

    Each round has another random order of samples.

    Args:
        prepare: called with a reader's name before it reads.
    """
    rows = np.arange(len(features.sample))
    n_batches, rates = {}, {name: [] for name in readers}
    for number in range(-2, rounds):  # two rounds to warm up, and to find how many batches a reader can read in time
        order = [index for index in shuffled_batches(rows, BATCH, seed=0, epoch=number + 2) if len(index) == BATCH]
        for name, reader in readers.items():
            prepare(name)
            rate = samples_per_second(reader, order[: 1 + n_batches.get(name, min_batches)])
            if number < 0:
                n_batches[name] = int(np.clip(seconds * rate / BATCH, min_batches, len(order) - 1))
            else:
                rates[name].append(rate)
    return rates


def ratio(rates: dict[str, list[float]], tested: str, *references: str) -> float | None:
    """Return how many times faster a reader is than the best of the references; None if none was measured."""
    measured = [rates[name] for name in references if name in rates]
    if not measured:
        return None
    rounds = zip(rates[tested], *measured, strict=True)
    return round(statistics.median(rate / max(reference_rates) for rate, *reference_rates in rounds), 3)


def measure_warm(features: FeatureStore) -> dict[str, dict]:
    """Return the rates of our reader and of each peer, by peer: two at a time fit the page cache."""
    rates = {}
    for peer in (*BUILT_IN, "zarr", "tensorstore", "litdata", "webdataset"):
        if peer in BUILT_IN or importlib.util.find_spec(peer):
            make_readers = getattr(peers, f"{peer}_readers")
            # Opened again for each peer, so that no pages stay mapped.
            readers = {"ours": _our_reader(FeatureStore(features.location))}
            readers |= make_readers(FeatureStore(features.location))
            rounds = ROUNDS_OF_SIMILAR if peer == "memmap" else ROUNDS
            rates[peer] = measure_rates(readers, features, partial(_warm_up, features, peer), rounds=rounds)
    return rates


def _warm_up(features: FeatureStore, peer: str, name: str) -> None:
    """Read a reader's files into the page cache; some machines drop them within seconds."""
    has_own_files = peer in ("memmap", "litdata", "webdataset") and not name.startswith("ours")
    for path in PEERS.glob(f"{peer}/*") if has_own_files else Path(features.location).rglob("c.*"):
        path.read_bytes()


def _our_reader(features: FeatureStore) -> Reader:
    return FeatureDataset({level: [(features, level_array(level))] for level in features.levels}).stream


def measure_cold(features: FeatureStore) -> dict[str, list[float]]:
    """Return rates of our reader and of the memory map when no file is in the page cache.

    Both are opened again for each round. A round has few batches: the system's own reading ahead is wasted at first,
    and later batches would find its results in the cache.
    """
    folders = {"ours": Path(features.location), "memmap": PEERS / "memmap"}

    def drop_cache(name):
        for path in [*folders[name].rglob("c.*"), *folders[name].glob("*.npy")]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    readers = {
        "ours": lambda order: _our_reader(FeatureStore(features.location))(order),
        "memmap": lambda order: peers.memmap_readers(features)["memmap"](order),
    }
    return measure_rates(readers, features, drop_cache, min_batches=8, seconds=0)


def measure_fused(first: FeatureStore, second: FeatureStore) -> dict[str, list[float]]:
    """Return rates of reading two stores into one batch, and of concatenating two batches.

    `concatenated` allocates new arrays, which is the default of NumPy and torch. `concatenated_in_place` reuses
    memory. `concatenated_overlapped` reuses memory, too, and concatenates while the prefetch thread reads on a core
    that is idle here.
    """
    levels = first.levels
    fused = FeatureDataset({level: [(store, level_array(level)) for store in (first, second)] for level in levels})
    separate = FeatureDataset({
        f"{level}-{number}": [(store, level_array(level))]
        for level in levels for number, store in enumerate((first, second))
    })  # fmt: skip
    buffer, separate_buffer = fused.allocate(BATCH), separate.allocate(BATCH)

    def concatenate(batch, out):
        for level in levels:
            np.concatenate([batch[f"{level}-0"], batch[f"{level}-1"]], axis=1, out=out[level])
        return out

    def concatenated(order):
        for index in order:
            batch = separate.get(index, separate_buffer)
            yield [np.concatenate([batch[f"{level}-0"], batch[f"{level}-1"]], axis=1) for level in levels]

    readers = {
        "fused": lambda order: (fused.get(index, buffer) for index in order),
        "concatenated": concatenated,
        "concatenated_in_place": lambda order: (
            concatenate(separate.get(index, separate_buffer), buffer) for index in order
        ),
        "fused_overlapped": fused.stream,
        "concatenated_overlapped": lambda order: (concatenate(batch, buffer) for _, batch in separate.stream(order)),
    }
    return measure_rates(readers, first, rounds=ROUNDS_OF_SIMILAR)


def main() -> None:
    features = feature_store("sample-trees", "lite0", 224, 6)
    size = sum(path.stat().st_size for path in Path(features.location).rglob("c.*"))
    assert size >= 2e9, f"the store has {size} bytes; the benchmark needs 2 GB"
    warm, cold = measure_warm(features), measure_cold(features)
    stores = [feature_store("sample-landuse", name, 128, 2) for name in ("csmask_b4", "lite0")]
    fused = measure_fused(*stores)

    def against(peer):
        """Our rate divided by that of the peer's best reader."""
        rates = warm.get(peer, {})
        return ratio(rates, "ours", *[name for name in rates if not name.startswith("ours")])

    def medians(rates):
        return {name: round(statistics.median(values)) for name, values in rates.items()}

    print(json.dumps({
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "gigabytes": round(size / 1e9, 2), "samples": len(features.sample), "batch": BATCH,
        "rounds": [ROUNDS, ROUNDS_OF_SIMILAR],
        "samples_per_second": {peer: medians(rates) for peer, rates in warm.items()},
        "cold_samples_per_second": medians(cold), "fused_samples_per_second": medians(fused),
        "vs_memmap": against("memmap"), "vs_pread": against("pread"), "vs_memory": against("memory"),
        "vs_zarr_python": against("zarr"),
        "vs_tensorstore": against("tensorstore"), "vs_litdata": against("litdata"),
        "vs_webdataset": against("webdataset"),
        "cold_vs_memmap": ratio(cold, "ours", "memmap"),
        "fused_vs_concat": ratio(fused, "fused", "concatenated"),
        "fused_vs_concat_in_place": ratio(fused, "fused", "concatenated_in_place"),
        "fused_vs_concat_overlapped": ratio(fused, "fused_overlapped", "concatenated_overlapped"),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
