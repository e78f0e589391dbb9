"""Folders that appear whole or not at all."""

import asyncio
import time

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore

from cache.atomic import atomic_dir


class FirstFailsRestLate(LocalStore):
    """A disk on which one chunk fails at once while those written beside it land later."""

    async def set(self, key, value):
        if key.endswith("c/0"):
            raise OSError(28, "No space left on device")
        if "/c/" in key:
            await asyncio.sleep(0.3)
        await super().set(key, value)


def test_a_failed_build_leaves_nothing_even_while_zarr_is_still_writing(tmp_path):
    def build():
        with atomic_dir(tmp_path / "scratch", tmp_path / "final") as folder:
            array = zarr.create_array(FirstFailsRestLate(folder), name="a", shape=(8,), chunks=(1,), dtype="int8")
            array[:] = np.arange(1, 9)

    with pytest.raises(OSError, match="No space"):
        build()
    assert list(tmp_path.iterdir()) == []
    time.sleep(0.6)
    assert list(tmp_path.iterdir()) == []
