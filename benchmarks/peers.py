"""Other libraries that read the same minibatches.

Each function writes its files once and returns its readers by name. A reader takes an order of samples and yields
once per batch, as soon as all levels of the batch are in memory.
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

from benchmarks.features import FOLDER, SHARD_SIZE, read_levels
from cache.reader import FeatureStore
from cache.schema import level_array

BATCH = 64
PEERS = FOLDER / "peers"

Reader = Callable[[list[np.ndarray]], Iterator]


def memmap_readers(features: FeatureStore) -> dict[str, Reader]:
    """NumPy memory maps of one .npy file per level."""
    folder = PEERS / "memmap"
    folder.mkdir(parents=True, exist_ok=True)
    maps = []
    for level in features.levels:
        path, array = folder / f"{level}.npy", features.array(level_array(level))
        if not path.exists():
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


def pread_readers(features: FeatureStore) -> dict[str, Reader]:
    """One system call per row instead of memory maps, by two threads, into reused memory."""
    files, buffers = {}, {}
    for level in features.levels:
        folder, shape = features.location / level / "features", features.array(level_array(level)).shape
        count = len(list(folder.glob("c.*")))
        files[level] = [os.open(folder / f"c.{number}.0.0.0", os.O_RDONLY) for number in range(count)]
        buffers[level] = np.empty((BATCH, *shape), "float16")
    pool = ThreadPoolExecutor(1)

    def read(index, part):
        for level, buffer in buffers.items():
            size = buffer[0].nbytes
            for row, target in zip(index[part], buffer[part].reshape(-1, size // 2), strict=True):
                os.preadv(files[level][row // SHARD_SIZE], (target,), row % SHARD_SIZE * size)

    def pread(order):
        for index in order:
            half = pool.submit(read, index.tolist(), slice(BATCH // 2))
            read(index.tolist(), slice(BATCH // 2, BATCH))
            half.result()
            yield buffers

    return {"pread": pread}


def memory_readers(features: FeatureStore) -> dict[str, Reader]:
    """torch's index_select from features that are in memory."""
    levels = [torch.from_numpy(values) for values in read_levels(features).values()]
    buffers = [torch.empty((BATCH, *level.shape[1:]), dtype=level.dtype) for level in levels]

    def memory(order):
        for index in order:
            rows = torch.from_numpy(index)
            for level, buffer in zip(levels, buffers, strict=True):
                torch.index_select(level, 0, rows, out=buffer)
            yield buffers

    return {"memory": memory}


def zarr_readers(features: FeatureStore) -> dict[str, Reader]:
    """Four ways to read a batch with zarr-python."""
    root = zarr.open_group(features.location, mode="r")
    arrays = [root[name] for name in features.level_arrays]
    shard_size = arrays[0].shards[0]

    def samples(order):
        for index in order:
            yield [np.stack([array[row] for row in index.tolist()]) for array in arrays]

    def whole_shards(order):
        for index in order:
            batch = []
            for array in arrays:
                values = np.empty((BATCH, *array.shape[1:]), array.dtype)
                for shard in np.unique(index // shard_size):
                    in_shard = index // shard_size == shard
                    rows = index[in_shard] - shard * shard_size
                    values[in_shard] = array[shard * shard_size : (shard + 1) * shard_size][rows]
                batch.append(values)
            yield batch

    def gathered(order):
        async def read(array, index):
            rows = [array.async_array.getitem((slice(row, row + 1),)) for row in index.tolist()]
            return np.concatenate(await asyncio.gather(*rows))

        for index in order:
            yield [zarr.core.sync.sync(read(array, index)) for array in arrays]

    def oindex(order):
        for index in order:
            yield [array.oindex[index] for array in arrays]

    return {"zarr_samples": samples, "zarr_shards": whole_shards, "zarr_gather": gathered, "zarr_oindex": oindex}


def tensorstore_readers(features: FeatureStore) -> dict[str, Reader]:
    """tensorstore, with a cache for the indices of shards."""
    # tensorstore is an optional dependency.
    import tensorstore

    # Without a cache every read fetches the shard's index again.
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


def _stack(samples: list[dict]) -> dict[str, np.ndarray]:
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0] if name.startswith("level")}


def litdata_readers(features: FeatureStore) -> dict[str, Reader]:
    """litdata's shuffled stream without and with workers, and its random access."""
    # litdata is an optional dependency.
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder = PEERS / "litdata"
    if not (folder / "index.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        writer = BinaryWriter(str(folder), chunk_bytes=64 << 20)
        for row in range(len(features.sample)):
            writer[row] = {level: values[0] for level, values in read_levels(features, row, row + 1).items()}
        writer.done()
        writer.merge()

    def stream(workers):
        dataset = StreamingDataset(str(folder), shuffle=True)

        def read(order):
            batches = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=_stack)
            for _, batch in zip(order, batches, strict=False):
                yield batch

        return read

    dataset = StreamingDataset(str(folder))

    def by_index(order):
        for index in order:
            yield _stack([dataset[row] for row in index.tolist()])

    return {"litdata_stream": stream(0), "litdata_workers": stream(2), "litdata_index": by_index}


def webdataset_readers(features: FeatureStore) -> dict[str, Reader]:
    """webdataset's shuffled stream."""
    # webdataset is an optional dependency.
    import webdataset

    folder = PEERS / "webdataset"
    shapes = {level: features.array(level_array(level)).shape for level in features.levels}
    if not folder.exists():
        partial = folder.with_name("webdataset.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for start in range(0, len(features.sample), 256):
            levels = read_levels(features, start, start + 256)
            with tarfile.open(partial / f"{start:06d}.tar", "w") as tar:
                for row in range(len(next(iter(levels.values())))):
                    for level, maps in levels.items():
                        content = maps[row].tobytes()
                        member = tarfile.TarInfo(f"{start + row:06d}.{level}")
                        member.size = len(content)
                        tar.addfile(member, BytesIO(content))
        partial.rename(folder)
    files = [str(path) for path in sorted(folder.glob("*.tar"))]

    def decode(sample):
        return {level: np.frombuffer(sample[level], "float16").reshape(shape) for level, shape in shapes.items()}

    def read(order):
        samples = iter(webdataset.WebDataset(files, shardshuffle=len(files)).shuffle(1000).map(decode).repeat())
        for _ in order:
            yield _stack([next(samples) for _ in range(BATCH)])

    return {"webdataset": read}
