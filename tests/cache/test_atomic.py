"""Folders that appear whole or not at all, and locks between processes."""

import asyncio
import shutil
import time

import numpy as np
import zarr
from zarr.storage import LocalStore

from cache.atomic import atomic_dir, lock_file
from tests.errors import raises


class FirstChunkFailsStore(LocalStore):
    """A disk on which one chunk fails at once, while the other chunks are written later."""

    async def set(self, key, value):
        if key.endswith("c/0"):
            raise OSError(28, "No space left on device")
        if "/c/" in key:
            await asyncio.sleep(0.1)
        await super().set(key, value)


def test_atomic_dir_with_a_failed_zarr_write_leaves_nothing(tmp_path):
    def fill():
        with atomic_dir(tmp_path / "scratch", tmp_path / "final") as folder:
            array = zarr.create_array(FirstChunkFailsStore(folder), name="a", shape=(8,), chunks=(1,), dtype="int8")
            array[:] = np.arange(1, 9)

    with raises(OSError, errno=28):
        fill()
    assert list(tmp_path.iterdir()) == []
    time.sleep(0.2)
    assert list(tmp_path.iterdir()) == []


def test_lock_file_is_exclusive_and_refused_in_a_deleted_folder(tmp_path):
    path = tmp_path / "folder/lock"
    assert lock_file(path) is None
    path.parent.mkdir()
    lock = lock_file(path)
    assert lock_file(path, wait=False) is None
    lock.release()
    lock = lock_file(path)
    shutil.rmtree(path.parent)
    assert lock_file(path) is None
    lock.release()
