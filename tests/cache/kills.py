"""A harness that kills writers, by themselves and in pairs, at random moments; prints what it saw as JSON.

    PYTHONPATH=.:tests/cache python tests/cache/kills.py FOLDER KILLS

Writers are forked from this process, which has the imports behind it, so that moments are spread over the work.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
from small_store import content, layout, write

from cache.errors import StoreError
from cache.reader import FeatureStore

DESCRIBED = layout(samples=60, shard=4)


def fork(work, *arguments) -> int:
    """A child that does the work and exits 0, or 1 if it fails."""
    if child := os.fork():
        return child
    try:
        work(*arguments)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def watch(final: Path, digest: str, stop: Path) -> None:
    """Open the store again and again; whatever opens must be the finished one, to the last byte it reads."""
    whole = opened = 0
    while not stop.exists():
        time.sleep(0.005)  # the processor is the writers'
        try:
            features = FeatureStore(final)
            values = features.read("level0/features", np.arange(60))
        except (StoreError, FileNotFoundError):
            continue
        opened += 1
        whole += features.attributes["content_sha256"] == digest and bool(np.isfinite(values).all())
    stop.with_suffix(".json").write_text(json.dumps([opened, whole]))


def main(folder: Path, wanted: int) -> None:
    begun = time.monotonic()
    assert os.waitpid(fork(write, folder / "unbroken", DESCRIBED), 0)[1] == 0
    span = time.monotonic() - begun
    unbroken = content(folder / "unbroken/store.zarr")
    digest = json.loads(unbroken["zarr.json"])["attributes"]["content_sha256"]
    broken, stop = folder / "broken", folder / "stop"
    watcher = fork(watch, broken / "store.zarr", digest, stop)
    generator = np.random.default_rng(0)
    kills = stores = different = failed = 0
    while kills < wanted:
        writers = [fork(write, broken, DESCRIBED) for _ in range(generator.integers(1, 3))]
        time.sleep(generator.uniform(0, 1.2 * span))
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
        for writer in writers:
            status = os.waitpid(writer, 0)[1]
            kills += os.WIFSIGNALED(status)
            failed += os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0
        if (broken / "store.zarr").exists():
            stores += 1
            different += content(broken / "store.zarr") != unbroken
            shutil.rmtree(broken)
    stop.touch()
    os.waitpid(watcher, 0)
    opened, whole = json.loads(stop.with_suffix(".json").read_text())
    print(json.dumps({"kills": int(kills), "stores": stores, "different": different, "failed": int(failed),
                      "opened": opened, "whole": whole}))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
