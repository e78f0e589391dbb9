"""Encode batches in parallel on a CPU, with some of the threads each; one after another on a GPU."""

import ctypes
import platform
import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from pipeline.backbones.encoder import Encoder

# Batches at the same time on a CPU; each needs memory.
_MAX_PARALLEL = 2
# Parameters of glibc's mallopt (malloc.h), and our values in bytes: larger blocks are mapped separately and returned
# when freed; less free memory than this stays in the heap.
_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES = -3, 4 * 2**20
_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES = -1, 16 * 2**20


class ParallelEncoder:
    """Runs functions that encode, a few at the same time; a context manager.

    The threads of one forward pass wait for each other in every layer, and for the slowest when other work needs a
    core. Parallel forward passes with fewer threads each do not.

    Args:
        encoder: is passed to the functions; parallel ones get clones that share its weights.

    Attributes:
        n_parallel: functions that run at the same time.
    """

    def __init__(self, encoder: Encoder):
        self._n_threads, self._pool, self._running = torch.get_num_threads(), None, deque()
        self.n_parallel = min(_MAX_PARALLEL, self._n_threads) if encoder.device == "cpu" else 1
        if encoder.device == "cpu":
            _tune_malloc()
        self._free_encoders = queue.SimpleQueue()
        for number in range(self.n_parallel):
            self._free_encoders.put(encoder.clone_sharing_weights() if number else encoder)

    def __enter__(self):
        if self.n_parallel > 1:
            self._pool = ThreadPoolExecutor(
                self.n_parallel,
                initializer=torch.set_num_threads,
                initargs=(self._n_threads // self.n_parallel,),
            )
        return self

    def __exit__(self, *_) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._n_threads)  # setting it in one thread changes it for later threads, too

    def submit(self, function: Callable, *args) -> Future:
        """Start `function(encoder, *args)` once at most one call waits; raise an earlier call's error."""
        if self._pool is None:
            done = Future()
            done.set_result(self._run(function, *args))
            return done
        while self._running and (len(self._running) > self.n_parallel or self._running[0].done()):
            self._running.popleft().result()
        self._running.append(self._pool.submit(self._run, function, *args))
        return self._running[-1]

    def _run(self, function: Callable, *args):
        encoder = self._free_encoders.get()
        try:
            return function(encoder, *args)
        finally:
            self._free_encoders.put(encoder)


def _tune_malloc() -> None:
    """Make glibc return the memory of layers' outputs when they are freed, for the rest of the process.

    By default it allocates blocks of up to 32 MB from one heap per thread. Small blocks between them keep the heaps
    from shrinking: memory grows by hundreds of megabytes with the number of batches until it stabilises.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
