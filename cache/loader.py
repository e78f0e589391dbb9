"""Minibatches from one or more feature stores, read ahead into memory that is used again and again."""

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cache.errors import StoreError
from cache.gather import THREADS, gather
from cache.reader import FeatureStore, check_aligned

# One batch in use, one being filled; a third would only push the others out of the processor's cache.
_BUFFERS = 2
# Batches told ahead after one that had to come from the disk.
_PREFETCH_BATCHES = 16
# Samples read at once while a set is brought into memory.
_ROWS_PER_READ = 256


class FeatureDataset:
    """Random access to the samples of one or several stores, several arrays at once.

    Three ways to read: `take(index)` for one batch in new memory; `stream(order)` for an epoch through a prefetch
    thread; and as a map-style dataset of a torch DataLoader (`len`, and indexing by a position or a list of them).

    Args:
        fields: for each name in a batch the (store, array) pairs that are joined along channels, such as
            `{"level2": [(hiera, "level2/features"), (prithvi, "level2/features")]}`. Stores must be aligned, and the
            arrays of one field alike in dtype and in all but channels.
        rows: the samples to read, such as `store.rows("train")`; None for all. Nothing is copied.
        view: which augmented copy; None for the first.
        budget: bytes; if the rows fit, they are read once and kept in memory, else they stay on disk.
        empty: makes the reused memory of `stream`, from a shape and a dtype; pinned memory, for instance.

    Attributes:
        stores: those of the fields, each once.
        rows: the samples to read.
        held: the rows are kept in memory.

    Raises:
        StoreError: stores that are not aligned, or arrays that cannot be joined.
    """

    def __init__(
        self,
        fields: Mapping[str, Sequence[tuple[FeatureStore, str]]],
        rows: np.ndarray | None = None,
        view: str | None = None,
        budget: int = 0,
        empty: Callable[[tuple[int, ...], np.dtype], np.ndarray] = np.empty,
    ):
        self._given = (fields, rows, view, budget, empty)
        self._fields = {name: list(parts) for name, parts in fields.items()}
        if not self._fields or not all(self._fields.values()):
            raise StoreError(f"Batches need fields, and each at least one (store, array) pair; given {dict(fields)}.")
        self.stores = list({id(store): store for parts in self._fields.values() for store, _ in parts}.values())
        check_aligned(self.stores)
        self.shapes, self.dtypes = {}, {}
        for name, parts in self._fields.items():
            self.shapes[name], self.dtypes[name] = _joined(name, parts)
        self.rows = self.stores[0].validate_index(np.arange(len(self.stores[0].sample)) if rows is None else rows)
        self._places = np.full(len(self.stores[0].sample), -1)
        self._places[self.rows] = np.arange(len(self.rows))
        self._view, self._empty = view, empty
        self._pool, self._process = None, None
        self._held = None
        if self.total_bytes <= budget:
            self._held = self._hold()

    @property
    def in_memory(self) -> bool:
        return self._held is not None

    @property
    def total_bytes(self) -> int:
        """What all the rows would take in memory."""
        return sum(
            len(self.rows) * int(np.prod(shape)) * self.dtypes[name].itemsize for name, shape in self.shapes.items()
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int | Sequence[int]) -> dict[str, np.ndarray]:
        """One sample, or a batch of them, by position among `rows`."""
        if isinstance(position, (int, np.integer)):
            return {name: values[0] for name, values in self.get(self.rows[[position]]).items()}
        return self.get(self.rows[np.asarray(position, dtype=np.int64)])

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """What a DataLoader that batches by itself asks for."""
        batch = self[positions]
        return [{name: values[place] for name, values in batch.items()} for place in range(len(positions))]

    def __reduce__(self):
        return FeatureDataset, self._given

    def get(self, index: np.ndarray, out: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Samples `index` of the stores, in that order.

        Args:
            out: what `memory` gave, for at least so many samples, to be filled from its start; None for new memory.
        """
        out = self._allocate(len(index), np.empty) if out is None else out
        self._fill(out, np.asarray(index))
        return {name: values[: len(index)] for name, values in out.items()}

    def allocate(self, count: int) -> dict[str, np.ndarray]:
        """Memory for `count` samples, made by `empty`."""
        return self._allocate(count, self._empty)

    def stream(self, order: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """An epoch: (index, batch) for every index array of `order`, read ahead by a thread.

        A batch's arrays are used again: they hold what they hold until the next batch is asked for. Memory is
        two batches of the largest size. Leaving the loop early ends the thread.
        """
        free, ready, stop = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
        for _ in range(_BUFFERS):
            free.put(None)
        reader = threading.Thread(target=self._read_ahead, args=(order, free, ready, stop), daemon=True)
        reader.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                index, buffer = item
                yield index, {name: out[: len(index)] for name, out in buffer.items()}
                free.put(buffer)
        finally:
            stop.set()
            free.put(None)
            reader.join()

    def _read_ahead(self, order, free: queue.SimpleQueue, ready: queue.SimpleQueue, stop: threading.Event) -> None:
        try:
            upcoming = (np.asarray(index) for index in order)
            index, cold, failed = next(upcoming, None), 0, None
            while index is not None:
                try:
                    following = next(upcoming, None)
                except BaseException as error:  # after the batch that is already known
                    following, failed = None, error
                buffer = free.get()
                if stop.is_set():
                    return
                if buffer is None or any(len(out) < len(index) for out in buffer.values()):
                    buffer = self._allocate(len(index), self._empty)
                if cold and following is not None:
                    self._advise(following)
                # A batch that was told ahead is at hand; that does not say that the next one would be.
                cold = _PREFETCH_BATCHES if self._fill(buffer, index) else max(0, cold - 1)
                ready.put((index, buffer))
                index = following
            ready.put(failed)
        except BaseException as error:
            ready.put(error)

    def _fill(self, out: Mapping[str, np.ndarray], index: np.ndarray) -> bool:
        """Gather samples into memory; returns whether they had to come from the disk."""
        places = self.positions(index)
        if self._held is not None:
            for name, held in self._held.items():
                np.take(held, places, axis=0, out=out[name][: len(index)], mode="clip")
            return False
        return gather(self._parts(index, out), self._threads())

    def _parts(self, index: np.ndarray, out: Mapping[str, np.ndarray]) -> list:
        """Which rows of which array go where; arrays joined along channels lie side by side."""
        found = []
        for name, members in self._fields.items():
            start = 0
            for store, array in members:
                rows = store.array(array)
                target = out[name][: len(index), start : start + rows.shape[0]]
                found.append((rows, store.row_index(index, self._view).tolist(), target))
                start += rows.shape[0]
        return found

    def _advise(self, index: np.ndarray) -> None:
        for members in self._fields.values():
            for store, array in members:
                rows = store.array(array)
                rows.prefetch(rows.locate(store.row_index(index, self._view).tolist()))

    def _hold(self) -> dict[str, np.ndarray]:
        held = self._allocate(len(self.rows), np.empty)
        for start in range(0, len(self.rows), _ROWS_PER_READ):
            some = slice(start, start + _ROWS_PER_READ)
            self._fill({name: out[some] for name, out in held.items()}, self.rows[some])
        return held

    def positions(self, index: np.ndarray) -> np.ndarray:
        """Where samples of the store stand among `rows`.

        Raises:
            StoreError: a sample that is not among them.
        """
        places = self._places[self.stores[0].validate_index(index)]
        if len(places) and places.min() < 0:
            raise StoreError(f"Sample {index[np.argmin(places)]} is not among the rows these batches were made for.")
        return places

    def _allocate(self, count: int, empty: Callable) -> dict[str, np.ndarray]:
        return {name: empty((count, *shape), self.dtypes[name]) for name, shape in self.shapes.items()}

    def _threads(self) -> ThreadPoolExecutor:
        """The pool of this process; a forked DataLoader worker makes its own."""
        if self._process != os.getpid():
            self._pool, self._process = ThreadPoolExecutor(THREADS), os.getpid()
        return self._pool


def _joined(name: str, parts: Sequence[tuple[FeatureStore, str]]) -> tuple[tuple[int, ...], np.dtype]:
    """One sample's shape and dtype of arrays joined along channels."""
    rows = [store.array(array) for store, array in parts]
    if len({(one.shape[1:], one.dtype) for one in rows}) > 1:
        raise StoreError(
            f"The arrays of '{name}' cannot be joined along channels: "
            + ", ".join(
                f"{array} of {store.location} is {one.shape} {one.dtype}"
                for (store, array), one in zip(parts, rows, strict=True)
            )
            + ". Ask for them as fields of their own."
        )
    return (sum(one.shape[0] for one in rows), *rows[0].shape[1:]), rows[0].dtype


def shuffled_batches(rows: np.ndarray, batch: int, seed: int, epoch: int = 0) -> Iterator[np.ndarray]:
    """The rows of one epoch in random order, a batch at a time, the last one as it comes out."""
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    for start in range(0, len(order), batch):
        yield order[start : start + batch]
