"""Other ways to read the same minibatches: each makes its files once and gives its ways by name.

A way goes from an order of samples to one item a batch, whatever it is, once all levels of the batch are there.
"""

import asyncio
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import torch
import zarr

from benchmarks.features import FOLDER, values
from cache.reader import FeatureStore

BATCH = 64
PEERS = FOLDER / "peers"

Way = Callable[[list[np.ndarray]], Iterator]


def memmap_ways(features: FeatureStore) -> dict[str, Way]:
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


def pread_ways(features: FeatureStore) -> dict[str, Way]:
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


def memory_ways(features: FeatureStore) -> dict[str, Way]:
    held = [torch.from_numpy(one) for one in values(features).values()]
    out = [torch.empty((BATCH, *one.shape[1:]), dtype=one.dtype) for one in held]

    def memory(order):
        for index in order:
            chosen = torch.from_numpy(index)
            for one, into in zip(held, out, strict=True):
                torch.index_select(one, 0, chosen, out=into)
            yield out

    return {"memory": memory}


def zarr_ways(features: FeatureStore) -> dict[str, Way]:
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


def tensorstore_ways(features: FeatureStore) -> dict[str, Way]:
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


def litdata_ways(features: FeatureStore) -> dict[str, Way]:
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


def webdataset_ways(features: FeatureStore) -> dict[str, Way]:
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
