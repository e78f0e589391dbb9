"""Locks between processes, on files, that their holder's death releases."""

import fcntl
import os
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def file_lock(path: Path):
    """Hold a lock that its holder's death releases; gives False if its folder is gone."""
    lock = try_lock(path, wait=True)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)


def try_lock(path: Path, wait: bool = False) -> int | None:
    """A descriptor that holds the lock until it is closed; None if another has it or its folder is gone."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT)
    except FileNotFoundError:
        return None
    with suppress(FileNotFoundError, BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(lock), path.stat()):  # not of a folder that was taken away meanwhile
            return lock
    os.close(lock)
    return None
