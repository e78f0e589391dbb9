"""Batches encoded side by side on a processor, each by threads of its own; one after another on a GPU."""

import ctypes
import platform
import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from pipeline.backbones.encoder import Encoder

# Batches at once on a processor, each of which takes memory.
_LANES = 2
# Bytes from which glibc is to map memory of its own and give it back at once, and free ones that it may keep: its
# mallopt's numbers (malloc.h) and our values.
_M_MMAP_THRESHOLD, _MAPPED = -3, 4 * 2**20
_M_TRIM_THRESHOLD, _KEPT = -1, 16 * 2**20


class ParallelEncoder:
    """Runs calls that encode, a few at once.

    The threads of one forward wait for one another in every layer, and when other work needs a core, all wait for the
    slowest. Forwards side by side do not.

    Args:
        encoder: whose twins, one a lane, the calls are given.

    Attributes:
        count: of calls that run at once.
    """

    def __init__(self, encoder: Encoder):
        self._threads, self._pool, self._running = torch.get_num_threads(), None, deque()
        self.count = min(_LANES, self._threads) if encoder.device == "cpu" else 1
        self._beside = self.count > 1
        if encoder.device == "cpu":
            _tune_malloc()
        self._free = queue.SimpleQueue()
        for number in range(self.count):
            self._free.put(encoder.clone_sharing_weights() if number else encoder)

    def __enter__(self):
        if self._beside:
            own = {"initializer": torch.set_num_threads, "initargs": (self._threads // self.count,)}
            self._pool = ThreadPoolExecutor(self.count, **own)
        return self

    def __exit__(self, *_) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)  # a thread that sets it sets it for threads to come

    def submit(self, call: Callable, *given) -> Future:
        """Begin `call(encoder, *given)`, as soon as but one waits; an error of an earlier call comes out here too."""
        if self._pool is None:
            done = Future()
            done.set_result(self._run(call, *given))
            return done
        while self._running and (len(self._running) > self.count or self._running[0].done()):
            self._running.popleft().result()
        self._running.append(self._pool.submit(self._run, call, *given))
        return self._running[-1]

    def _run(self, call: Callable, *given):
        encoder = self._free.get()
        try:
            return call(encoder, *given)
        finally:
            self._free.put(encoder)


def _tune_malloc() -> None:
    """Have glibc give layers' outputs back when they are freed, for the rest of the process.

    By itself it soon cuts blocks of up to 32 MB from heaps, one a thread, which keep what others lie beside: memory
    grows by hundreds of megabytes with the number of batches, until the heaps have settled.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _MAPPED)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
