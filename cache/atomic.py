"""Durable writes, folders that are published in one step, and locks between processes."""

import asyncio
import os
import shutil
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

# A disk flushes many files concurrently in the time that it needs for one.
_CONCURRENT_FLUSHES = 16
_MAX_BUFFERS_PER_WRITE = os.sysconf("SC_IOV_MAX")


def sync_file(path: Path) -> None:
    """Flush one file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names to the disk."""
    sync_file(path)


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file so that it is complete and on the disk as soon as it has its name.

    The caller flushes the folder (`sync_folder`). An OSError has its `filename` set, also when the disk is full.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb", buffering=0) as file:
            _write_all(file.fileno(), parts)
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # the system names no file when the disk is full
        raise
    finally:
        partial.unlink(missing_ok=True)


def _write_all(descriptor: int, parts: Iterable[bytes | memoryview]) -> None:
    """Write parts in as few calls as possible: the system then caches the file in larger pages."""
    remaining = [memoryview(part).cast("B") for part in parts if len(part)]
    while remaining:
        written = os.writev(descriptor, remaining[:_MAX_BUFFERS_PER_WRITE])
        while remaining and written >= len(remaining[0]):
            written -= len(remaining.pop(0))
        if remaining:
            remaining[0] = remaining[0][written:]


def publish(scratch: Path, final: Path, durable: Container[str] = ()) -> None:
    """Flush `scratch`, then rename it to `final`, replacing an existing one.

    Both must lie on one file system. A kill leaves the old folder, no folder, or the new one, never a part of one.

    Args:
        durable: paths relative to `scratch` of files that `write_file` wrote, which need no flush.
    """
    folders = list(os.walk(scratch, topdown=False))  # the deepest first
    files = (os.path.join(folder, name) for folder, _, names in folders for name in names)
    with ThreadPoolExecutor(_CONCURRENT_FLUSHES) as pool:
        list(pool.map(sync_file, (file for file in files if os.path.relpath(file, scratch) not in durable)))
    for folder, _, _ in folders:
        sync_folder(Path(folder))
    final.parent.mkdir(parents=True, exist_ok=True)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(scratch, final)
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(final.parent)


@contextmanager
def atomic_dir(scratch: Path, final: Path) -> Iterator[Path]:
    """Yield an empty folder; publish it as `final` if the block succeeds, delete it if the block fails."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        publish(scratch, final)
    finally:
        _drain_zarr_writes()
        shutil.rmtree(scratch, ignore_errors=True)


def _drain_zarr_writes() -> None:
    """Wait for the writes that zarr still runs: when one fails, zarr raises while the others continue."""
    # zarr takes 0.25 s to import, and stages that write JSON do not need it.
    from zarr.core.sync import sync

    async def drain() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*tasks, return_exceptions=True)

    sync(drain())


def lock_file(path: Path, wait: bool = True) -> FileLock | None:
    """Lock a file between processes; `release` or the death of the process unlocks it.

    Returns None if the folder of `path` does not exist (any more) or, without `wait`, if the file is locked.
    """
    if not path.parent.is_dir():  # FileLock would create it
        return None
    try:
        return FileLock(path, thread_local=False, blocking=wait).acquire().lock
    except (Timeout, FileNotFoundError):
        return None
