"""Writing, resuming and locks: whole shards and folders, the same bytes, and no silent loss."""

import asyncio
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import zarr
from small_store import file_bytes, shard_values, small_schema, write_store
from zarr.storage import LocalStore

from cache import checksums
from cache.atomic import atomic_dir, lock_file
from cache.errors import StoreError
from cache.reader import FeatureStore
from cache.verify import verify
from cache.writer import Writer
from tests.errors import raises

SCHEMA = small_schema()


def new_writer(folder, schema=SCHEMA, **provenance):
    return Writer(folder / "scratch", schema, folder / "store.zarr", provenance or {"backbone": "b"})


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Bytes of the files of a store that was written without interruption."""
    folder = tmp_path_factory.mktemp("unbroken")
    write_store(folder)
    return file_bytes(folder / "store.zarr")


def test_resumed_writer_gives_the_same_bytes(tmp_path, unbroken):
    assert write_store(tmp_path, stop_after=2) is None
    assert not (tmp_path / "store.zarr").exists()
    level = tmp_path / "scratch/store.zarr/level0/features"
    (level / "c.2.0.0.0.123.partial").write_text("partly written before a kill")
    (level / "c.2.0.0.0").write_text("written, but not recorded")
    write_store(tmp_path)
    assert file_bytes(tmp_path / "store.zarr") == unbroken
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("step", ["writer.publish", "writer.consolidate_metadata", "checksums.write"])
def test_writer_killed_while_finishing_gives_the_same_bytes(tmp_path, monkeypatch, unbroken, step):
    write_store(tmp_path, stop_after=0)  # creates the store
    with monkeypatch.context() as patched:
        patched.setattr(f"cache.{step}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_store(tmp_path)
    write_store(tmp_path)
    assert file_bytes(tmp_path / "store.zarr") == unbroken


def test_two_writers_share_a_store_and_both_get_its_digest(tmp_path):
    schema = small_schema(samples=60, shard_size=10)
    digest = write_store(tmp_path / "alone", schema)
    writers = [new_writer(tmp_path, schema) for _ in range(2)]
    claims = [writer.claim_shards() for writer in writers]
    first_shards = [next(shards) for shards in claims]
    assert first_shards[0] != first_shards[1]
    written = []

    def write(writer, shards):
        for shard in shards:
            writer.write(shard, shard_values(schema, shard))
            written.append(shard)

    for writer, shard in zip(writers, first_shards, strict=True):
        write(writer, [shard])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, writers, claims))
    assert sorted(written) == list(range(6))
    assert [writer.finish() for writer in writers] == [digest, digest]
    assert list(writers[1].claim_shards()) == []
    late = new_writer(tmp_path, schema)
    assert late.pending_shards() == list(late.claim_shards()) == []
    assert late.finish() == digest
    assert not (tmp_path / "scratch").exists()


def test_shard_of_a_dead_writer_is_claimed_by_another(tmp_path):
    dying, living = new_writer(tmp_path), new_writer(tmp_path)
    dying_claims = dying.claim_shards()
    assert next(dying_claims) == 0
    claims = living.claim_shards()
    assert [next(claims), next(claims)] == [1, 2]
    dying_claims.close()  # as the death of its process would
    assert next(claims) in (0, 1, 2)


@pytest.mark.parametrize("change", [{"schema": small_schema(shard_size=32)}, {"backbone": "c"}], ids=list)
def test_writer_of_another_schema_or_provenance_is_refused(tmp_path, change):
    new_writer(tmp_path)
    with raises(StoreError, key="fingerprint", path=tmp_path / "scratch"):
        new_writer(tmp_path, **change)


def test_unfinished_store_is_refused_by_reader_and_finish(tmp_path):
    write_store(tmp_path, stop_after=2)
    with raises(StoreError, path=tmp_path / "store.zarr"):
        FeatureStore(tmp_path / "store.zarr")
    shutil.copytree(tmp_path / "scratch/store.zarr", tmp_path / "store.zarr")
    with raises(StoreError, key="complete", path=tmp_path / "store.zarr"):
        FeatureStore(tmp_path / "store.zarr")
    checksums.write(tmp_path / "store.zarr", {})
    with raises(StoreError, key="complete", path=tmp_path / "store.zarr"):
        verify(tmp_path / "store.zarr")
    shutil.rmtree(tmp_path / "store.zarr")
    with raises(StoreError, key="shards", value=[2], path=tmp_path / "scratch"):
        new_writer(tmp_path).finish()


def test_write_of_too_large_or_subnormal_values_is_refused_and_infinities_pass(tmp_path):
    writer = new_writer(tmp_path)
    values = shard_values(SCHEMA, 0)
    values["level0/features"][3, 1, 2, 2] = 70000
    values["level0/features"][9, 1, 2, 2] = -80000
    with raises(StoreError, "2 ", "level0/features", "8e+04", "65504", key="extract.dtype", value="float16"):
        writer.write(0, values)
    assert writer.pending_shards() == [0, 1, 2]
    values["level0/features"][3, 1, 2, 2:4] = np.inf, np.nan
    values["level0/features"][9, 1, 2, 2] = -np.inf
    writer.write(0, values)
    assert writer.pending_shards() == [1, 2]
    values["level1/features"] *= 1e-7
    with raises(StoreError, "level1/features", "100%", key="extract.dtype", value="float16"):
        writer.write(1, values)


def test_write_of_a_wrong_shard_or_of_wrong_arrays_is_refused(tmp_path):
    writer, values = new_writer(tmp_path), shard_values(SCHEMA, 0)
    vector = values["pooled/mean_level0"]
    for change in (
        {"level0/features": values["level0/features"]},
        {**values, "pooled/mean_level0": vector[:10]},
        {**values, "pooled/mean_level0": vector[:, :2]},
    ):
        with raises(StoreError, "pooled/mean_level0", (64, 5), key="values", path=tmp_path / "scratch") as info:
            writer.write(0, change)
        assert info.value.value == {name: array.shape for name, array in change.items()}
        assert dict(info.value.allowed)["pooled/mean_level0"] == (64, 5)
    with raises(StoreError, key="shard", value=3):
        writer.write(3, {})


def test_provenance_decides_the_digest_and_measurements_do_not(tmp_path):
    def digest(name, measurements=None, **provenance):
        schema = small_schema(samples=8)
        writer = Writer(tmp_path / name, schema, tmp_path / f"{name}.zarr", provenance)
        writer.write(0, shard_values(schema, 0))
        return writer.finish(measurements)

    measurements = {"precision_error": {"level0": 0.01}}
    assert digest("a", bands=["red"]) != digest("b", bands=["nir"])
    assert digest("c", measurements, bands=["nir"]) == digest("d", bands=["nir"])
    assert FeatureStore(tmp_path / "c.zarr").attributes["measurements"] == measurements
    assert str(measurements) in verify(tmp_path / "c.zarr")


@pytest.mark.parametrize("has_levels", [True, False])
def test_writer_killed_after_publishing_leaves_nothing_to_do(tmp_path, monkeypatch, has_levels):
    """The scratch folder then still has every record, but no store."""
    schema = SCHEMA if has_levels else replace(SCHEMA, levels=())
    with monkeypatch.context() as patched:
        patched.setattr(Writer, "_remove_scratch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_store(tmp_path, schema)
    whole = file_bytes(tmp_path / "store.zarr")
    writer = new_writer(tmp_path, schema)
    assert writer.pending_shards() == []
    digest = writer.finish()
    assert file_bytes(tmp_path / "store.zarr") == whole
    # If the store is deleted, all of it is written again, whatever records a kill left.
    (tmp_path / "scratch/shards").mkdir(parents=True)
    (tmp_path / "scratch/shards/0.json").write_text("{}")
    shutil.rmtree(tmp_path / "store.zarr")
    assert new_writer(tmp_path, schema).pending_shards() == [0, 1, 2]
    assert write_store(tmp_path, schema) == digest
    assert file_bytes(tmp_path / "store.zarr") == whole


def test_finished_store_that_lost_a_file_is_written_again(tmp_path, unbroken):
    write_store(tmp_path)
    assert new_writer(tmp_path).pending_shards() == []
    for file in ("level1/features/c.1.0.0.0", "pooled/mean_level0/zarr.json", "SHA256SUMS"):
        content = (tmp_path / "store.zarr" / file).read_bytes()
        (tmp_path / "store.zarr" / file).unlink()
        assert new_writer(tmp_path).pending_shards() == [0, 1, 2]
        shutil.rmtree(tmp_path / "scratch")
        (tmp_path / "store.zarr" / file).write_bytes(content)
    (tmp_path / "store.zarr" / file).unlink()
    write_store(tmp_path)
    assert file_bytes(tmp_path / "store.zarr") == unbroken


def test_another_store_at_the_final_path_is_replaced(tmp_path):
    for codec in ("none", "zstd"):
        write_store(tmp_path, small_schema(samples=8, codec=codec))
    assert FeatureStore(tmp_path / "store.zarr", verify=True).attributes["codec"] == "zstd"


def test_write_flushes_bytes_before_their_record_and_the_record_before_returning(tmp_path, monkeypatch):
    """The order of flushes, which killing a process cannot show."""
    writer, flushed, fsync = new_writer(tmp_path), [], os.fsync

    def recording_fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        flushed.append(path.removeprefix(f"{tmp_path}/scratch/"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    writer.write(0, shard_values(SCHEMA, 0))

    def first_flush(prefix):
        return next(number for number, path in enumerate(flushed) if path.startswith(prefix))

    record = first_flush("shards/0.json")
    for name in SCHEMA.shapes():
        assert first_flush(f"store.zarr/{name}/c.0") < flushed.index(f"store.zarr/{name}") < record
    assert flushed[-1] == "shards"


def test_shard_claimed_while_another_thread_releases_is_released(tmp_path, monkeypatch):
    writer, locks = new_writer(tmp_path), []

    def lock_during_release(path, wait):
        lock = lock_file(path, wait)
        if not locks:
            writer.release()  # by another thread, between the check and the lock
        locks.append(lock)
        return lock

    monkeypatch.setattr("cache.writer.lock_file", lock_during_release)
    assert list(writer.claim_shards()) == [0]
    assert not writer._claimed


class FirstChunkFailsStore(LocalStore):
    """A disk on which one chunk fails at once, while the other chunks are written later."""

    async def set(self, key, value):
        if key.endswith("c/0"):
            raise OSError(28, "No space left on device")
        if "/c/" in key:
            await asyncio.sleep(0.1)
        await super().set(key, value)


def test_atomic_dir_with_a_failed_zarr_write_leaves_nothing(tmp_path):
    with raises(OSError, errno=28), atomic_dir(tmp_path / "scratch", tmp_path / "final") as folder:
        array = zarr.create_array(FirstChunkFailsStore(folder), name="a", shape=(8,), chunks=(1,), dtype="int8")
        array[:] = np.arange(1, 9)
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
