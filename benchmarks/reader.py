"""Random minibatches from the feature store, compared with other readers of the same values.

    python -m benchmarks.reader

Rates are samples per second, medians over alternating rounds. A ratio is the median over rounds of our rate divided
by that of the other's best reader.
"""

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorstore
import zarr

from benchmarks.features import FOLDER, feature_store, read_levels
from benchmarks.timing import save_results
from cache import arrays
from cache.loader import FeatureDataset, shuffled_batches
from cache.reader import FeatureStore
from cache.schema import level_array

BATCH = 64
ROUNDS = {"memmap": 15}  # the median of few rounds is uncertain where two readers are almost equally fast
OTHER_ROUNDS = 5
SECONDS = 1.0  # of a round, so that a slow reader reads fewer batches
COLD_BATCHES = 8  # few: later batches would find what the system reads ahead

# Takes an order of samples and yields once per batch, as soon as all levels of the batch are in memory.
Reader = Callable[[list[np.ndarray]], Iterator]


def our_reader(features: FeatureStore) -> Reader:
    """The loader's stream, of a store that is opened again, so that no pages are mapped yet."""
    store = FeatureStore(features.location)
    return FeatureDataset({level: [(store, level_array(level))] for level in store.levels}).stream


def memmap_readers(features: FeatureStore) -> dict[str, Reader]:
    """NumPy memory maps of one .npy file per level."""
    maps = []
    for level in features.levels:
        path, array = FOLDER / f"memmap/{level}.npy", features.array(level_array(level))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.npy")
            file = np.lib.format.open_memmap(partial, "w+", array.dtype, (len(features.sample), *array.shape))
            for start in range(0, len(file), 512):
                file[start : start + 512] = read_levels(features, start, start + 512)[level]
            file.flush()
            partial.rename(path)
        maps.append(np.load(path, mmap_mode="r"))
    buffers = [np.empty((BATCH, *level_map.shape[1:]), level_map.dtype) for level_map in maps]

    def memmap(order):
        for index in order:
            for level_map, buffer in zip(maps, buffers, strict=True):
                # mode="raise" would read into a temporary buffer first, at half the speed.
                np.take(level_map, index, axis=0, out=buffer, mode="clip")
            yield buffers

    return {"memmap": memmap}


def zarr_readers(features: FeatureStore) -> dict[str, Reader]:
    """Two ways to read a batch with zarr-python."""
    arrays = [zarr.open_group(features.location, mode="r")[name] for name in features.level_arrays]

    def gathered(order):
        async def read(array, index):
            rows = [array.async_array.getitem((slice(row, row + 1),)) for row in index.tolist()]
            return np.concatenate(await asyncio.gather(*rows))

        for index in order:
            yield [zarr.core.sync.sync(read(array, index)) for array in arrays]

    def oindex(order):
        for index in order:
            yield [array.oindex[index] for array in arrays]

    return {"zarr_gather": gathered, "zarr_oindex": oindex}


def tensorstore_readers(features: FeatureStore) -> dict[str, Reader]:
    """tensorstore, with a cache: without one, every read fetches the shard's index again."""
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 64 << 20}})
    arrays = [
        tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{features.location}/{name}"},
             "recheck_cached_data": "open", "recheck_cached_metadata": "open"}, context=context
        ).result()
        for name in features.level_arrays
    ]  # fmt: skip

    def by_index(order):
        for index in order:
            yield [future.result() for future in [array[index].read() for array in arrays]]

    return {"tensorstore": by_index}


def samples_per_second(reader: Reader, order: list[np.ndarray]) -> float:
    """Return the rate of a reader without its first batch, which includes its start."""
    batches = reader(order)
    next(batches)
    start = time.perf_counter()
    return sum(BATCH for _ in batches) / (time.perf_counter() - start)


def measure_rates(readers: dict[str, Reader], features: FeatureStore, prepare: Callable, rounds: int, cold=False):
    """Return the rates of every reader in alternating rounds, each with another order of samples.

    Args:
        prepare: called before each round, and if `cold` before each reader.
        cold: read `COLD_BATCHES` instead of batches for `SECONDS`.
    """
    rows, n_batches = np.arange(len(features.sample)), dict.fromkeys(readers, COLD_BATCHES if cold else 2)
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(-2, rounds):  # two rounds to warm up, and to find how many batches a reader can read in time
        order = [index for index in shuffled_batches(rows, BATCH, seed=0, epoch=number + 2) if len(index) == BATCH]
        for position, (name, reader) in enumerate(readers.items()):
            if cold or position == 0:
                prepare()
            rate = samples_per_second(reader, order[: 1 + n_batches[name]])
            if number >= 0:
                rates[name].append(rate)
            elif not cold:
                n_batches[name] = int(np.clip(SECONDS * rate / BATCH, 2, len(order) - 1))
    return rates


def main() -> None:
    features = feature_store("sample-trees", "lite0", 224, 6)
    files = list(Path(features.location).rglob("c.*"))
    size = sum(path.stat().st_size for path in files)
    assert size >= 2e9, f"the store has {size} bytes; the benchmark needs 2 GB"
    arrays.MAX_MAPPED_BYTES *= 2  # pages of the memory map, in the same process, count too
    makers = {"memmap": memmap_readers, "zarr_python": zarr_readers, "tensorstore": tensorstore_readers}
    readers = {name: {"ours": our_reader(features)} | make(features) for name, make in makers.items()}

    def warm() -> None:
        """Read all files into the page cache; some machines drop them within seconds."""
        for path in [*files, *FOLDER.glob("memmap/*.npy")]:
            path.read_bytes()

    def drop_cache() -> None:
        for path in [*files, *FOLDER.glob("memmap/*.npy")]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    rates = {
        name: measure_rates(group, features, warm, ROUNDS.get(name, OTHER_ROUNDS)) for name, group in readers.items()
    }
    del readers  # mapped pages stay in the page cache
    cold_readers = {
        "ours": lambda order: our_reader(features)(order),
        "memmap": lambda order: memmap_readers(features)["memmap"](order),
    }
    rates["cold_memmap"] = measure_rates(cold_readers, features, drop_cache, OTHER_ROUNDS, cold=True)
    ratios = {}
    for peer, group in rates.items():
        rounds = zip(group["ours"], *(values for name, values in group.items() if name != "ours"), strict=True)
        ratios[f"vs_{peer}"] = round(statistics.median(rate / max(peers) for rate, *peers in rounds), 3)
    medians = {
        peer: {name: round(statistics.median(values)) for name, values in group.items()}
        for peer, group in rates.items()
    }
    save_results("reader", {
        "gigabytes": round(size / 1e9, 2), "samples": len(features.sample), "samples_per_second": medians, **ratios,
    })  # fmt: skip


if __name__ == "__main__":
    main()
