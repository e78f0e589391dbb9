"""Bytes that are safe on disk, and folders that appear at their final name in one step."""

import os
import shutil
from collections.abc import Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

# Files flushed at once.
_CONCURRENT_FLUSHES = 16
# Parts that one call may write.
_MAX_BUFFERS_PER_WRITE = os.sysconf("SC_IOV_MAX")


def sync_file(path: Path) -> None:
    """Flush one file to the disk."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names to the disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def sync_tree(path: Path, durable: Container[str] = ()) -> None:
    """Flush every file and folder below `path`, but files that are `durable`, the deepest first.

    Files side by side: a disk flushes many in the time of one.

    Args:
        durable: paths within it of files that are on the disk already, as `write_file` leaves them.
    """
    walked = list(os.walk(path, topdown=False))
    files = (os.path.join(folder, name) for folder, _, names in walked for name in names)
    with ThreadPoolExecutor(_CONCURRENT_FLUSHES) as pool:
        list(pool.map(sync_file, (file for file in files if os.path.relpath(file, path) not in durable)))
    for folder, _, _ in walked:
        sync_folder(Path(folder))


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file that is on the disk, whole, when it has its name; the caller syncs the folder."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb", buffering=0) as file:
            _write_all(file, parts)
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk should say where
        raise
    finally:
        partial.unlink(missing_ok=True)


def _write_all(file, parts: Iterable[bytes | memoryview]) -> None:
    """Write parts in as few calls as there can be: the system then caches the file in larger pages."""
    rest = [memoryview(part).cast("B") for part in parts if len(part)]
    while rest:
        written = os.writev(file.fileno(), rest[:_MAX_BUFFERS_PER_WRITE])
        while rest and written >= len(rest[0]):
            written -= len(rest.pop(0))
        if rest:
            rest[0] = rest[0][written:]


def publish(scratch: Path, final: Path, durable: Container[str] = ()) -> None:
    """Make `scratch` appear as `final`, whole, replacing what was there.

    Both must lie on one file system. A kill leaves the old folder, no folder, or the new one: never a part.

    Args:
        durable: as for `sync_tree`.
    """
    sync_tree(scratch, durable)
    final.parent.mkdir(parents=True, exist_ok=True)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(scratch, final)
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(final.parent)


@contextmanager
def atomic_dir(scratch: Path, final: Path):
    """An empty folder to fill, which is published as `final` if nothing fails, and removed if anything does."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        publish(scratch, final)
    finally:
        _drain_zarr_writes()
        shutil.rmtree(scratch, ignore_errors=True)


def _drain_zarr_writes() -> None:
    """Wait for zarr's writes under way: when one fails it reports at once and lets those beside it go on."""
    import asyncio

    from zarr.core.sync import sync  # here, since zarr takes a quarter of a second to import

    async def settled():
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    sync(settled())


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
