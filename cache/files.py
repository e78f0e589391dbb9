"""The files of a local store, open and mapped into memory, no more of either than the process may have."""

import mmap
import os
import resource
import threading
import weakref
from collections import defaultdict
from contextlib import suppress
from functools import cache
from typing import ClassVar

import numpy as np

from cache.errors import StoreError

VERIFY_HINT = "Check the store with: python -m cache.verify PATH"
_MAX_OPEN_FILES = 1 << 14


@cache
def max_open_files() -> int:
    """How many files all stores together may hold open: a quarter of what the process may, since each counts twice.

    The usual limit of 1,024 is there for programs that call `select`; like Go's runtime this asks for what the
    system grants, since opening a file again for every row would cost as much as reading it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 4 * _MAX_OPEN_FILES
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else min(_MAX_OPEN_FILES, soft // 4)


class MmapPool:
    """Opens files of one store, and sees that no more are open than the process may have.

    They are opened relative to the store's folder as it was: a store that is replaced meanwhile is noticed. A file
    that is cut short while it is open ends the process, as with any memory map; stores never change in place.

    Args:
        folder: the store's.
        mapped: bytes that may stay mapped, or None for a tenth of the machine's memory.

    Attributes:
        lock: to be held while calling `open`, and while using what it gave to others.
        opened: what has been opened, by array and number of the file; emptied when there are too many.
    """

    _live: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self, folder: str, mapped: int | None = None):
        self.folder, self.lock = folder, threading.Lock()
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._mapped = memory // 10 if mapped is None else mapped
        self.opened: dict[str, dict[int, tuple]] = defaultdict(dict)
        self._root, self._count = _Descriptor(folder, os.O_DIRECTORY), 0
        # Mapped files in the process other than this store's, and whether this one is too large to stay mapped.
        self._others, self._beyond = _mapped_bytes(), False
        MmapPool._live.add(self)

    def open(self, path: str) -> "MmapFile":
        """The open file at `path` within the store; it stays open while anyone holds what is returned."""
        if self._count >= max(1, max_open_files() // len(MmapPool._live)):
            self._count = 0
            for files in self.opened.values():
                files.clear()
        self._count += 1
        try:
            file = MmapFile(path, self._root.number)
        except FileNotFoundError:
            raise StoreError(
                f"{path} is missing from {self.folder}, or that store was replaced while it was read. {VERIFY_HINT}"
            ) from None
        if file.map:
            self._in_small_pieces(file.map)
        return file

    def release_excess(self) -> None:
        """Let go of what is mapped if that is more than may stay so; to be called before rows are copied."""
        held = _mapped_bytes()
        if held - self._others <= self._mapped:
            return
        maps = [file.map for files in self.opened.values() for _, file, _ in files.values() if file.map]
        if not self._beyond and sum(map(len, maps)) > self._mapped:
            self._beyond = True
        for one in maps:
            self._in_small_pieces(one)
            one.madvise(mmap.MADV_DONTNEED)
        self._others = _mapped_bytes()

    def _in_small_pieces(self, one: mmap.mmap) -> None:
        """Map pages singly: a touched row of a store that cannot stay mapped should not bring 2 MB with it."""
        if self._beyond and hasattr(mmap, "MADV_NOHUGEPAGE"):
            with suppress(OSError):  # a system without huge pages
                one.madvise(mmap.MADV_NOHUGEPAGE)

    @staticmethod
    def _after_fork() -> None:
        """Another thread may have held the lock of a process when it was forked; it is not here to let go."""
        _statm.cache_clear()
        for files in MmapPool._live:
            files.lock = threading.Lock()


os.register_at_fork(after_in_child=MmapPool._after_fork)


@cache
def _statm() -> "_Descriptor | None":
    try:
        return _Descriptor("/proc/self/statm")
    except OSError:
        return None


def _mapped_bytes() -> int:
    """Bytes of mapped files in this process's memory, as the system counts them; 0 where it does not say.

    Counted, not reckoned from what was read: by how much more than the page that is touched is mapped at once
    differs from kernel to kernel, up to 2 MB.
    """
    statm = _statm()
    if statm is None:
        return 0
    return int(os.pread(statm.number, 128, 0).split()[2]) * mmap.PAGESIZE


class _Descriptor:
    """A file descriptor that closes with its last holder."""

    def __init__(self, path: str, flags: int = 0, dir_fd: int | None = None):
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | flags, dir_fd=dir_fd)

    def __del__(self):
        if self.number >= 0:
            os.close(self.number)


class MmapFile(_Descriptor):
    """A file that is open and mapped; it has two descriptors, its own and the map's.

    Attributes:
        content: its bytes, uint8.
    """

    def __init__(self, path: str, folder: int):
        super().__init__(path, dir_fd=folder)
        self.map, self.content = None, np.empty(0, np.uint8)
        if os.fstat(self.number).st_size:
            self.map = mmap.mmap(self.number, 0, prot=mmap.PROT_READ)
            self.content = np.frombuffer(self.map, np.uint8)
