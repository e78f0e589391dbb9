"""Kill writers, alone and in pairs, at random moments; prints the outcome as JSON.

    PYTHONPATH=.:tests/cache python tests/cache/kills.py FOLDER KILLS

Writers are forked from this process, which has imported everything, so that the moments cover the whole work.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
from small_store import file_bytes, small_schema, write_store

from cache.errors import StoreError
from cache.reader import FeatureStore

SCHEMA = small_schema(samples=20, shard_size=4)


def fork(work, *arguments) -> int:
    """Run `work` in a child process, which exits with 0, or with 1 if it fails; returns its process id."""
    if child := os.fork():
        return child
    try:
        work(*arguments)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def watch(final: Path, digest: str, stop: Path) -> None:
    """Open the store repeatedly; whatever opens must be the finished store with all its values."""
    n_opened = n_whole = 0
    while not stop.exists():
        time.sleep(0.005)  # leaves the CPU to the writers
        try:
            features = FeatureStore(final)
            values = features.read("level0/features", np.arange(20))
        except (StoreError, FileNotFoundError):
            continue
        n_opened += 1
        n_whole += features.attributes["content_sha256"] == digest and bool(np.isfinite(values).all())
    stop.with_suffix(".json").write_text(json.dumps([n_opened, n_whole]))


def main(folder: Path, min_kills: int) -> None:
    start = time.monotonic()
    assert os.waitpid(fork(write_store, folder / "unbroken", SCHEMA), 0)[1] == 0
    duration = time.monotonic() - start
    unbroken = file_bytes(folder / "unbroken/store.zarr")
    digest = json.loads(unbroken["zarr.json"])["attributes"]["content_sha256"]
    broken, stop = folder / "broken", folder / "stop"
    watcher = fork(watch, broken / "store.zarr", digest, stop)
    generator = np.random.default_rng(0)
    n_kills = n_stores = n_different = n_failed = 0
    while n_kills < min_kills:
        writers = [fork(write_store, broken, SCHEMA) for _ in range(generator.integers(1, 3))]
        time.sleep(generator.uniform(0, 1.2 * duration))
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
        for writer in writers:
            status = os.waitpid(writer, 0)[1]
            n_kills += os.WIFSIGNALED(status)
            n_failed += os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0
        if (broken / "store.zarr").exists():
            n_stores += 1
            n_different += file_bytes(broken / "store.zarr") != unbroken
            shutil.rmtree(broken)
    stop.touch()
    os.waitpid(watcher, 0)
    n_opened, n_whole = json.loads(stop.with_suffix(".json").read_text())
    print(json.dumps({"kills": int(n_kills), "stores": n_stores, "different": n_different, "failed": int(n_failed),
                      "opened": n_opened, "whole": n_whole}))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
