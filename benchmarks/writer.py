"""Writing a feature store, made durable, against plain files of the same bytes, made durable.

    python -m benchmarks.writer

Both write the same float16 values, real features of `benchmarks.features`, by turns, and flush every file and folder
to the disk. Ours also hashes and records every shard; `_narrowing` is given float32, which it checks, narrows and
measures the loss of; `_with_statistics` adds training statistics and publishing. A ratio is the median over rounds
of our rate over theirs.
"""

import json
import os
import platform
import shutil
import statistics
import time

import numpy as np
import zarr

from benchmarks.features import FOLDER, store, values
from cache.atomic import sync_file, sync_folder
from cache.schema import LevelSchema, StoreSchema, create_store
from cache.writer import Writer

ROUNDS = 9
SHARDS = 32
SCRATCH = FOLDER / "writing"


def main() -> None:
    source = store("sample-trees", "lite0", 224, 6)
    shard = values(source, 0, 64)
    plain = {f"{level}/features": maps for level, maps in shard.items()}
    wide = {name: maps.astype(np.float32) for name, maps in plain.items()}
    size = SHARDS * sum(maps.nbytes for maps in plain.values())
    layout = StoreSchema(
        sample=tuple(map(str, range(64 * SHARDS))), split=("train",) * 64 * SHARDS, pooled={}, dtype="float16",
        levels=tuple(LevelSchema(*maps.shape[1:], 1, "") for maps in shard.values()), shard_size=64,
    )  # fmt: skip

    def ours(given: dict) -> tuple[float, float]:
        """Seconds until the last shard is safe, and until the store is published with its statistics."""
        begun = time.perf_counter()
        writer = Writer(SCRATCH / "scratch", layout, SCRATCH / "store.zarr", {})
        for number in writer.claim_shards():
            writer.write(number, given)
        written = time.perf_counter() - begun
        writer.finish()
        return written, time.perf_counter() - begun

    def zarr_python() -> float:
        """Seconds for zarr-python's own writing of the same shards, flushed as ours are."""
        create_store(SCRATCH / "zarr", layout)
        root = zarr.open_group(SCRATCH / "zarr", mode="r+")
        begun = time.perf_counter()
        for number in range(SHARDS):
            for name, maps in plain.items():
                # Without looking for empty chunks, which would take four times as long.
                array = root[name].with_config({"write_empty_chunks": True})
                array[layout.rows(number)] = maps
                sync_file(SCRATCH / "zarr" / name / f"c.{number}.0.0.0")
                sync_folder(SCRATCH / "zarr" / name)
        return time.perf_counter() - begun

    def files() -> float:
        begun = time.perf_counter()
        for number in range(SHARDS):
            for name, maps in plain.items():
                path = SCRATCH / name / str(number)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(maps.data)
                sync_file(path)
                sync_folder(path.parent)
        return time.perf_counter() - begun

    def measured(work):
        shutil.rmtree(SCRATCH, ignore_errors=True)
        os.sync()
        return work()

    ways = {
        "plain": files,
        "ours": lambda: ours(plain)[0],
        "ours_narrowing": lambda: ours(wide)[0],
        "ours_with_statistics": lambda: ours(plain)[1],
        "zarr_python": zarr_python,
    }
    rounds, names = [], list(ways)
    for number in range(ROUNDS + 1):  # each round begins with another way, since the one before leaves its traces
        turn = number % len(names)
        rounds.append({name: measured(ways[name]) for name in names[turn:] + names[:turn]})
    shutil.rmtree(SCRATCH)
    seconds = {way: [one[way] for one in rounds[1:]] for way in rounds[0]}  # the first round warms up

    def ratio(ours, theirs):
        return round(statistics.median(b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)), 3)

    print(json.dumps({
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "gigabytes": round(size / 1e9, 2), "rounds": ROUNDS,
        "gigabytes_per_second": {
            way: round(size / 1e9 / statistics.median(times), 3) for way, times in seconds.items()
        },
        "vs_plain_write": ratio("ours", "plain"), "vs_plain_write_narrowing": ratio("ours_narrowing", "plain"),
        "vs_plain_write_with_statistics": ratio("ours_with_statistics", "plain"),
        "vs_zarr_python": ratio("ours", "zarr_python"),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
