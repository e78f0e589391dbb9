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
from collections.abc import Callable
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
SECONDS = 1.5  # a way that is slow reads fewer batches
PEERS = FOLDER / "peers"

Way = Callable[[list[np.ndarray]], None]


def rates(ways: dict[str, Way], features: Features, prepare: Callable[[str], None] = lambda name: None) -> dict:
    """Samples a second of every way and round, the ways by turns, each round in another random order of samples."""
    rows = np.arange(len(features.sample))
    counts, measured = {}, {name: [] for name in ways}
    for number in range(-1, ROUNDS):  # the first round warms up and finds how many batches a way can do in time
        order = [index for index in shuffled(rows, BATCH, seed=0, epoch=number + 1) if len(index) == BATCH]
        for name, way in ways.items():
            prepare(name)
            some = order[: counts.get(name, 4)]
            begun = time.perf_counter()
            way(some)
            taken = time.perf_counter() - begun
            if number >= 0:
                measured[name].append(len(some) * BATCH / taken)
            counts[name] = counts.get(name) or int(np.clip(SECONDS / (taken / len(some)), 4, len(order)))
    return measured


def ratio(measured: dict, ours: str, *theirs: str) -> float | None:
    """How many times faster than the best of others; None where none was measured."""
    there = [measured[name] for name in theirs if name in measured]
    if not there:
        return None
    return round(statistics.median(mine / max(other) for mine, *other in zip(measured[ours], *there, strict=True)), 3)


def warm(features: Features) -> dict[str, Way]:
    """Every way to read all levels of a batch."""
    batches = Batches({level: [(features, f"{level}/features")] for level in features.levels})

    def ours(order):
        for _ in batches.stream(order):
            pass

    return {"ours": ours} | _memmap(features) | _memory(features) | _zarr(features) | _others(features)


def _memmap(features: Features) -> dict[str, Way]:
    PEERS.mkdir(parents=True, exist_ok=True)
    maps = []
    for level in features.levels:
        path = PEERS / f"{level}.npy"
        rows = features.array(f"{level}/features")
        if not path.exists():
            laid = np.lib.format.open_memmap(path, "w+", rows.dtype, (len(features.sample), *rows.shape))
            for start in range(0, len(laid), 512):
                laid[start : start + 512] = values(features, start, start + 512)[level]
            laid.flush()
        maps.append(np.load(path, mmap_mode="r"))
    out = [np.empty((BATCH, *one.shape[1:]), one.dtype) for one in maps]

    def memmap(order):
        for index in order:
            for one, into in zip(maps, out, strict=True):
                # mode="raise" would read into memory of its own first, at half the speed.
                np.take(one, index, axis=0, out=into, mode="clip")

    return {"memmap": memmap}


def _memory(features: Features) -> dict[str, Way]:
    held = [torch.from_numpy(one) for one in values(features).values()]
    out = [torch.empty((BATCH, *one.shape[1:]), dtype=one.dtype) for one in held]

    def memory(order):
        for index in order:
            chosen = torch.from_numpy(index)
            for one, into in zip(held, out, strict=True):
                torch.index_select(one, 0, chosen, out=into)

    return {"memory": memory}


def _zarr(features: Features) -> dict[str, Way]:
    root = zarr.open_group(features.location, mode="r")
    arrays = [root[f"{level}/features"] for level in features.levels]
    step = arrays[0].shards[0]

    def zarr_samples(order):
        for index in order:
            for array in arrays:
                np.stack([array[row] for row in index.tolist()])

    def zarr_shards(order):
        for index in order:
            for array in arrays:
                out = np.empty((BATCH, *array.shape[1:]), array.dtype)
                for shard in np.unique(index // step):
                    wanted = index // step == shard
                    out[wanted] = array[shard * step : (shard + 1) * step][index[wanted] - shard * step]

    def zarr_gather(order):
        async def batch(array, index):
            rows = [array.async_array.getitem((slice(row, row + 1),)) for row in index.tolist()]
            return np.concatenate(await asyncio.gather(*rows))

        for index in order:
            for array in arrays:
                zarr.core.sync.sync(batch(array, index))

    def zarr_oindex(order):
        for index in order:
            for array in arrays:
                array.oindex[index]

    return {"zarr_samples": zarr_samples, "zarr_shards": zarr_shards, "zarr_gather": zarr_gather} | {
        "zarr_oindex": zarr_oindex
    }


def _others(features: Features) -> dict[str, Way]:
    makers = {"tensorstore": _tensorstore, "litdata": _litdata, "webdataset": _webdataset}
    ways = {}
    for package, make in makers.items():
        if importlib.util.find_spec(package):
            ways |= make(features)
    return ways


def _tensorstore(features: Features) -> dict[str, Way]:
    import tensorstore

    arrays = [
        tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{features.location}/{level}/features"}}
        ).result()
        for level in features.levels
    ]

    def by_index(order):
        for index in order:
            for reading in [array[index].read() for array in arrays]:
                reading.result()

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

    def make(workers):
        data = StreamingDataset(str(folder), shuffle=True)

        def read(order):
            loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=_stacked)
            for number, _ in enumerate(loader, 1):
                if number == len(order):
                    break

        return read

    data = StreamingDataset(str(folder))

    def by_index(order):
        for index in order:
            _stacked([data[row] for row in index.tolist()])

    return {"litdata_stream": make(0), "litdata_workers": make(2), "litdata_index": by_index}


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
        data = webdataset.WebDataset(files, shardshuffle=len(files)).shuffle(1000).map(decode)
        samples, done = [], 0
        for sample in data:
            samples.append(sample)
            if len(samples) == BATCH:
                _stacked(samples)
                samples, done = [], done + 1
                if done == len(order):
                    break

    return {"webdataset": read}


def cold(features: Features) -> dict:
    """Ours and the memory map, with the page cache of their files dropped before every reading."""
    ways = warm_pair(features)
    places = {"ours": Path(features.location), "memmap": PEERS}

    def drop(name):
        files = [path for path in places[name].rglob("*") if path.suffix == ".npy" or path.name.startswith("c.")]
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    return rates(ways, features, drop)


def warm_pair(features: Features) -> dict[str, Way]:
    """Ours and a memory map opened anew, whose pages no one has touched."""
    batches = Batches({level: [(features, f"{level}/features")] for level in features.levels})

    def ours(order):
        for _ in batches.stream(order):
            pass

    return {"ours": ours, "memmap": lambda order: _memmap(features)["memmap"](order)}


def fused(first: Features, second: Features) -> dict:
    """Two stores into one batch, against the same reader into two batches which are then concatenated."""
    levels = first.levels
    into_one = Batches({level: [(one, f"{level}/features") for one in (first, second)] for level in levels})
    apart = Batches({
        f"{level}{number}": [(one, f"{level}/features")]
        for level in levels for number, one in enumerate((first, second))
    })  # fmt: skip
    out = {level: np.empty((BATCH, *into_one.shapes[level]), "float16") for level in levels}

    def fused_batch(order):
        for _ in into_one.stream(order):
            pass

    def concatenated(order):
        for _, batch in apart.stream(order):
            for level in levels:
                np.concatenate([batch[f"{level}0"], batch[f"{level}1"]], axis=1)

    def concatenated_in_place(order):
        for _, batch in apart.stream(order):
            for level in levels:
                np.concatenate([batch[f"{level}0"], batch[f"{level}1"]], axis=1, out=out[level])

    ways = {"fused": fused_batch, "concatenated": concatenated, "concatenated_in_place": concatenated_in_place}
    return rates(ways, first)


def main() -> None:
    features = store("sample-trees", "lite0", 224, 8)
    size = sum(rows.stat().st_size for rows in Path(features.location).rglob("c.*"))
    measured = rates(warm(features), features)
    chilled = cold(features)
    joined = fused(store("sample-landuse", "csmask_b4", 128, 2), store("sample-landuse", "lite0", 128, 2))
    zarr_ways = [name for name in measured if name.startswith("zarr")]
    litdata_ways = [name for name in measured if name.startswith("litdata")]
    print(json.dumps({
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "gigabytes": round(size / 1e9, 2), "samples": len(features.sample), "batch": BATCH, "rounds": ROUNDS,
        "rates": {name: round(statistics.median(each)) for name, each in measured.items()},
        "cold_rates": {name: round(statistics.median(each)) for name, each in chilled.items()},
        "fused_rates": {name: round(statistics.median(each)) for name, each in joined.items()},
        "vs_memmap": ratio(measured, "ours", "memmap"),
        "vs_memory": ratio(measured, "ours", "memory"),
        "vs_zarr_python": ratio(measured, "ours", *zarr_ways),
        "vs_tensorstore": ratio(measured, "ours", "tensorstore"),
        "vs_litdata": ratio(measured, "ours", *litdata_ways),
        "vs_webdataset": ratio(measured, "ours", "webdataset"),
        "cold_vs_memmap": ratio(chilled, "ours", "memmap"),
        "fused_vs_concat": ratio(joined, "fused", "concatenated", "concatenated_in_place"),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
