"""Random minibatches from the feature store, against other ways to read the same values.

    python -m benchmarks.reader

Needs the extra `bench` for tensorstore, litdata and webdataset; without one its fields are null. Rates are samples a
second, medians over alternating rounds; a ratio is the median over rounds of our rate over theirs.
"""

import asyncio
import importlib.util
import json
import os
import platform
import shutil
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import zarr

from benchmarks.features import FOLDER, store, values
from cache.batches import Batches, shuffled
from cache.read import Features

BATCH = 64
ROUNDS = 5
SECONDS = 1.0  # a slow way reads fewer batches
LEAST = 2
PEERS = FOLDER / "peers"

# From an order of samples to one item a batch, whatever it is, once the batch is there.
Way = Callable[[list[np.ndarray]], Iterator]


def rate(way: Way, order: list[np.ndarray]) -> float:
    """Samples a second; the first batch, with what a way needs to start, is not counted."""
    batches = way(order)
    next(batches)
    begun = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * BATCH / (time.perf_counter() - begun)


def rates(
    ways: dict[str, Way],
    features: Features,
    prepare: Callable[[str], None] = lambda name: None,
    least: int = LEAST,
    seconds: float = SECONDS,
) -> dict:
    """Rates of every way and round, the ways by turns, each round in another random order of samples."""
    rows = np.arange(len(features.sample))
    counts, measured = {}, {name: [] for name in ways}
    for number in range(-2, ROUNDS):  # two rounds to warm up and to find how many batches a way can do in time
        order = [index for index in shuffled(rows, BATCH, seed=0, epoch=number + 2) if len(index) == BATCH]
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


def warm(features: Features) -> dict[str, dict]:
    """Ours beside each peer, by peer: one at a time, so that the page cache holds the files of both."""
    makers = {"memmap": _memmap, "pread": _pread, "memory": _memory, "zarr": _zarr, "tensorstore": _tensorstore}
    makers |= {"litdata": _litdata, "webdataset": _webdataset}
    measured = {}
    for peer, make in makers.items():
        if importlib.util.find_spec(peer) or peer in ("memmap", "pread", "memory"):
            # Opened anew, so that nothing stays mapped from one peer to the next.
            ways = {"ours": _ours(Features(features.location))} | make(Features(features.location))
            if peer == "memmap":
                ways["ours_mapped_256_mib"] = _ours(Features(features.location, mapped=256 << 20))
            measured[peer] = rates(ways, features, partial(_warm, features, peer))
    return measured


def _warm(features: Features, peer: str, name: str) -> None:
    """Bring the files of a way into the page cache; some machines take it back within seconds."""
    own = peer in ("memmap", "litdata", "webdataset") and not name.startswith("ours")
    for path in PEERS.glob(f"{peer}/*") if own else Path(features.location).rglob("c.*"):
        path.read_bytes()


def _ours(features: Features) -> Way:
    batches = Batches({level: [(features, f"{level}/features")] for level in features.levels})
    return batches.stream


def _memmap(features: Features) -> dict[str, Way]:
    folder = PEERS / "memmap"
    folder.mkdir(parents=True, exist_ok=True)
    maps = []
    for level in features.levels:
        path, rows = folder / f"{level}.npy", features.array(f"{level}/features")
        if not path.exists():
            partial = path.with_suffix(".partial.npy")
            laid = np.lib.format.open_memmap(partial, "w+", rows.dtype, (len(features.sample), *rows.shape))
            for start in range(0, len(laid), 512):
                laid[start : start + 512] = values(features, start, start + 512)[level]
            laid.flush()
            partial.rename(path)
        maps.append(np.load(path, mmap_mode="r"))
    out = [np.empty((BATCH, *one.shape[1:]), one.dtype) for one in maps]

    def memmap(order):
        for index in order:
            for one, into in zip(maps, out, strict=True):
                # mode="raise" would read into memory of its own first, at half the speed.
                np.take(one, index, axis=0, out=into, mode="clip")
            yield out

    return {"memmap": memmap}


def _pread(features: Features) -> dict[str, Way]:
    """What the reader could do instead of mapping: a system call a row, two threads, into reused memory."""
    files, out = {}, {}
    for level in features.levels:
        folder, shape = features.location / level / "features", features.array(f"{level}/features").shape
        count = len(list(folder.glob("c.*")))
        files[level] = [os.open(folder / f"c.{number}.0.0.0", os.O_RDONLY) for number in range(count)]
        out[level] = np.empty((BATCH, *shape), "float16")
    pool = ThreadPoolExecutor(1)

    def share(index, some):
        for level, into in out.items():
            size = into[0].nbytes
            for row, target in zip(index[some], into[some].reshape(-1, size // 2), strict=True):
                os.preadv(files[level][row // 64], (target,), row % 64 * size)

    def pread(order):
        for index in order:
            half = pool.submit(share, index.tolist(), slice(BATCH // 2))
            share(index.tolist(), slice(BATCH // 2, BATCH))
            half.result()
            yield out

    return {"pread": pread}


def _memory(features: Features) -> dict[str, Way]:
    held = [torch.from_numpy(one) for one in values(features).values()]
    out = [torch.empty((BATCH, *one.shape[1:]), dtype=one.dtype) for one in held]

    def memory(order):
        for index in order:
            chosen = torch.from_numpy(index)
            for one, into in zip(held, out, strict=True):
                torch.index_select(one, 0, chosen, out=into)
            yield out

    return {"memory": memory}


def _zarr(features: Features) -> dict[str, Way]:
    """zarr-python's own ways to the same batch."""
    root = zarr.open_group(features.location, mode="r")
    arrays = [root[f"{level}/features"] for level in features.levels]
    step = arrays[0].shards[0]

    def samples(order):
        for index in order:
            yield [np.stack([array[row] for row in index.tolist()]) for array in arrays]

    def whole_shards(order):
        for index in order:
            batch = []
            for array in arrays:
                out = np.empty((BATCH, *array.shape[1:]), array.dtype)
                for shard in np.unique(index // step):
                    wanted = index // step == shard
                    out[wanted] = array[shard * step : (shard + 1) * step][index[wanted] - shard * step]
                batch.append(out)
            yield batch

    def gathered(order):
        async def rows(array, index):
            every = [array.async_array.getitem((slice(row, row + 1),)) for row in index.tolist()]
            return np.concatenate(await asyncio.gather(*every))

        for index in order:
            yield [zarr.core.sync.sync(rows(array, index)) for array in arrays]

    def oindex(order):
        for index in order:
            yield [array.oindex[index] for array in arrays]

    return {"zarr_samples": samples, "zarr_shards": whole_shards, "zarr_gather": gathered, "zarr_oindex": oindex}


def _tensorstore(features: Features) -> dict[str, Way]:
    import tensorstore

    # Without a cache every read fetches the shard's index again.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 64 << 20}})
    arrays = [
        tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{features.location}/{level}/features"},
             "recheck_cached_data": "open", "recheck_cached_metadata": "open"}, context=context
        ).result()
        for level in features.levels
    ]  # fmt: skip

    def by_index(order):
        for index in order:
            yield [reading.result() for reading in [array[index].read() for array in arrays]]

    return {"tensorstore": by_index}


def _stacked(samples: list[dict]) -> dict[str, np.ndarray]:
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0] if name.startswith("level")}


def _litdata(features: Features) -> dict[str, Way]:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder = PEERS / "litdata"
    if not (folder / "index.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        writer = BinaryWriter(str(folder), chunk_bytes=64 << 20)
        for row in range(len(features.sample)):
            writer[row] = {level: one[0] for level, one in values(features, row, row + 1).items()}
        writer.done()
        writer.merge()

    def loader(workers):
        data = StreamingDataset(str(folder), shuffle=True)

        def read(order):
            batches = StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=_stacked)
            for _, batch in zip(order, batches, strict=False):
                yield batch

        return read

    data = StreamingDataset(str(folder))

    def by_index(order):
        for index in order:
            yield _stacked([data[row] for row in index.tolist()])

    return {"litdata_stream": loader(0), "litdata_workers": loader(2), "litdata_index": by_index}


def _webdataset(features: Features) -> dict[str, Way]:
    import webdataset

    folder = PEERS / "webdataset"
    shapes = {level: features.array(f"{level}/features").shape for level in features.levels}
    if not folder.exists():
        partial = folder.with_name("webdataset.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for start in range(0, len(features.sample), 256):
            some = values(features, start, start + 256)
            with tarfile.open(partial / f"{start:06d}.tar", "w") as tar:
                for row in range(len(next(iter(some.values())))):
                    for level, maps in some.items():
                        content = maps[row].tobytes()
                        member = tarfile.TarInfo(f"{start + row:06d}.{level}")
                        member.size = len(content)
                        tar.addfile(member, BytesIO(content))
        partial.rename(folder)
    files = [str(path) for path in sorted(folder.glob("*.tar"))]

    def decode(sample):
        return {level: np.frombuffer(sample[level], "float16").reshape(shape) for level, shape in shapes.items()}

    def read(order):
        data = webdataset.WebDataset(files, shardshuffle=len(files)).shuffle(1000).map(decode).repeat()
        samples = iter(data)
        for _ in order:
            yield _stacked([next(samples) for _ in range(BATCH)])

    return {"webdataset": read}


def cold(features: Features) -> dict:
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
        "ours": lambda order: _ours(Features(features.location))(order),
        "memmap": lambda order: _memmap(features)["memmap"](order),
    }
    return rates(ways, features, drop, least=8, seconds=0)


def fused(first: Features, second: Features) -> dict:
    """Two stores into one batch, against the same reader into two batches which are then concatenated.

    `concatenated` makes new arrays as numpy and torch do unless told otherwise; `in_place` reuses memory;
    `overlapped` does that too, and concatenates while the prefetch thread reads on, on a core that is idle here.
    """
    levels = first.levels
    into_one = Batches({level: [(one, f"{level}/features") for one in (first, second)] for level in levels})
    apart = Batches({
        f"{level}-{number}": [(one, f"{level}/features")]
        for level in levels for number, one in enumerate((first, second))
    })  # fmt: skip
    out, parts = into_one.memory(BATCH), apart.memory(BATCH)

    def join(batch, out):
        for level in levels:
            np.concatenate([batch[f"{level}-0"], batch[f"{level}-1"]], axis=1, out=out[level])
        return out

    def concatenated(order):
        for index in order:
            batch = apart.take(index, parts)
            yield [np.concatenate([batch[f"{level}-0"], batch[f"{level}-1"]], axis=1) for level in levels]

    ways = {
        "fused": lambda order: (into_one.take(index, out) for index in order),
        "concatenated": concatenated,
        "concatenated_in_place": lambda order: (join(apart.take(index, parts), out) for index in order),
        "fused_overlapped": into_one.stream,
        "concatenated_overlapped": lambda order: (join(batch, out) for _, batch in apart.stream(order)),
    }
    return rates(ways, first)


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
        "gigabytes": round(size / 1e9, 2), "samples": len(features.sample), "batch": BATCH, "rounds": ROUNDS,
        "rates": {peer: medians(ways) for peer, ways in measured.items()},
        "cold_rates": medians(chilled), "fused_rates": medians(joined),
        "vs_memmap": against("memmap"), "vs_pread": against("pread"), "vs_memory": against("memory"),
        "mapped_256_mib_vs_memmap": ratio(measured["memmap"], "ours_mapped_256_mib", "memmap"),
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
