"""Durable writing of a feature store, compared with durable plain files of the same bytes.

    python -m benchmarks.writer

Both write the same float16 values, features of `benchmarks.features`, in alternation, and flush every file and folder
to the disk. Our writer also hashes and records every shard. `ours_casting` is given float32 and also checks, casts
and measures the error; `ours_with_statistics` also adds training statistics and publishes the store. A ratio is the
median over rounds of our rate divided by the other's.
"""

import json
import os
import platform
import shutil
import statistics
import time

import numpy as np
import zarr

from benchmarks.features import FOLDER, SHARD_SIZE, feature_store, read_levels
from cache.atomic import sync_file, sync_folder
from cache.schema import LevelSchema, StoreSchema, create_store, level_array
from cache.writer import Writer

ROUNDS = 9
N_SHARDS = 32
SCRATCH = FOLDER / "writing"


def main() -> None:
    source = feature_store("sample-trees", "lite0", 224, 6)
    levels = read_levels(source, 0, SHARD_SIZE)
    float16 = {level_array(level): maps for level, maps in levels.items()}
    float32 = {name: maps.astype(np.float32) for name, maps in float16.items()}
    size = N_SHARDS * sum(maps.nbytes for maps in float16.values())
    n_samples = SHARD_SIZE * N_SHARDS
    schema = StoreSchema(
        sample=tuple(map(str, range(n_samples))), split=("train",) * n_samples, pooled={}, dtype="float16",
        levels=tuple(LevelSchema(*maps.shape[1:], 1, "") for maps in levels.values()), shard_size=SHARD_SIZE,
    )  # fmt: skip

    def write_store(values: dict) -> tuple[float, float]:
        """Return the seconds until the last shard is on the disk, and until the store is published."""
        start = time.perf_counter()
        writer = Writer(SCRATCH / "scratch", schema, SCRATCH / "store.zarr", {})
        for shard in writer.claim_shards():
            writer.write(shard, values)
        written = time.perf_counter() - start
        writer.finish()
        return written, time.perf_counter() - start

    def write_with_zarr_python() -> float:
        """Return the seconds in which zarr-python writes the same shards, flushed as ours are."""
        create_store(SCRATCH / "zarr", schema)
        root = zarr.open_group(SCRATCH / "zarr", mode="r+")
        start = time.perf_counter()
        for shard in range(N_SHARDS):
            for name, maps in float16.items():
                # Without the check for empty chunks, which would take four times as long.
                array = root[name].with_config({"write_empty_chunks": True})
                array[schema.rows(shard)] = maps
                sync_file(SCRATCH / "zarr" / name / f"c.{shard}.0.0.0")
                sync_folder(SCRATCH / "zarr" / name)
        return time.perf_counter() - start

    def write_plain_files() -> float:
        start = time.perf_counter()
        for shard in range(N_SHARDS):
            for name, maps in float16.items():
                path = SCRATCH / name / str(shard)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(maps.data)
                sync_file(path)
                sync_folder(path.parent)
        return time.perf_counter() - start

    def measure(write) -> float:
        shutil.rmtree(SCRATCH, ignore_errors=True)
        os.sync()
        return write()

    writers = {
        "plain": write_plain_files,
        "ours": lambda: write_store(float16)[0],
        "ours_casting": lambda: write_store(float32)[0],
        "ours_with_statistics": lambda: write_store(float16)[1],
        "zarr_python": write_with_zarr_python,
    }
    rounds, names = [], list(writers)
    for number in range(ROUNDS + 1):  # each round starts with another writer, since each affects the next
        first = number % len(names)
        rounds.append({name: measure(writers[name]) for name in names[first:] + names[:first]})
    shutil.rmtree(SCRATCH)
    seconds = {name: [times[name] for times in rounds[1:]] for name in names}  # the first round warms up

    def ratio(tested, reference):
        return round(statistics.median(b / a for a, b in zip(seconds[tested], seconds[reference], strict=True)), 3)

    print(json.dumps({
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "gigabytes": round(size / 1e9, 2), "rounds": ROUNDS,
        "gigabytes_per_second": {
            name: round(size / 1e9 / statistics.median(times), 3) for name, times in seconds.items()
        },
        "vs_plain_write": ratio("ours", "plain"), "vs_plain_write_casting": ratio("ours_casting", "plain"),
        "vs_plain_write_with_statistics": ratio("ours_with_statistics", "plain"),
        "vs_zarr_python": ratio("ours", "zarr_python"),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
