"""Open and mapped files: few enough, let go of, and of one store only."""

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from small_store import SAMPLES, everything, layout, write

from cache import files, gather
from cache.errors import StoreError
from cache.reader import FeatureStore


def test_a_child_of_a_reading_process_can_read(tmp_path):
    """A lock that another thread held when the process was forked would stay held in the child."""
    write(tmp_path)
    features = FeatureStore(tmp_path / "store.zarr")
    with features._files.lock:
        child = os.fork()
        if not child:
            os._exit(0 if features.read("level0/features", [3]).shape == (1, 5, 8, 8) else 1)
    for _ in range(200):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child waits for a lock that no one holds")
    assert status == 0


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
    write(tmp_path, layout(shard=2))
    features = FeatureStore(tmp_path / "store.zarr")
    for module in (files, gather):
        monkeypatch.setattr(module, "files_allowed", lambda: 6 * len(files.MmapPool._live))
    order = np.random.default_rng(0).permutation(SAMPLES)
    expected = everything(layout(shard=2), "level0/features").astype("float16")[order]
    np.testing.assert_array_equal(features.read("level0/features", order), expected)
    assert 1 <= sum(map(len, features._files.opened.values())) <= 6


def test_what_is_mapped_is_let_go(tmp_path):
    """Values are the same, and of the files' pages no more stay in the process than may."""
    write(tmp_path, layout(samples=3000, shard=500))
    features = FeatureStore(tmp_path / "store.zarr", max_mapped_bytes=100_000)
    order = np.random.default_rng(0).integers(0, 3000, 1000)
    expected = everything(layout(samples=3000, shard=500), "level0/features").astype("float16")[order]
    for start in range(0, 1000, 50):
        read = features.read("level0/features", order[start : start + 50])
        np.testing.assert_array_equal(read, expected[start : start + 50])
    features.read("level0/features", order[:2])
    lines, resident = Path("/proc/self/smaps").read_text().split("\n"), 0
    for number, line in enumerate(lines):
        if "level0/features/c." in line:
            resident += int(next(one for one in lines[number:] if one.startswith("Rss:")).split()[1]) * 1024
    size = sum(path.stat().st_size for path in (tmp_path / "store.zarr/level0/features").glob("c.*"))
    assert size > 1_900_000
    assert resident < size / 2  # two rows, and what the system maps around them


def test_a_store_replaced_while_it_is_read_is_noticed(tmp_path):
    write(tmp_path)
    features = FeatureStore(tmp_path / "store.zarr")
    features.read("level0/features", [0])
    shutil.rmtree(tmp_path / "store.zarr")
    write(tmp_path, seed=1)
    with pytest.raises(StoreError, match="or that store was replaced while it was read"):
        features.read("level0/features", [140])
