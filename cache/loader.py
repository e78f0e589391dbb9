"""Minibatches from one or more feature stores, prefetched into reused memory."""

import math
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cache.arrays import READ_THREADS, ReadRequest, gather
from cache.errors import StoreError
from cache.reader import FeatureStore, check_aligned

# One batch is used while the next is read; a third would evict the others from the CPU's cache.
_N_BUFFERS = 2
_ROWS_PER_READ = 256

Empty = Callable[[tuple[int, ...], np.dtype], np.ndarray]


class FeatureDataset:
    """Random access to samples of one or several stores, several arrays at once.

    There are three ways to read: `get(index)` returns one batch in new memory; `stream(order)` yields an epoch
    through a prefetch thread; and a torch DataLoader uses it as a map-style dataset (`len`, and indexing by a
    position or a list of positions).

    Args:
        fields: for each name in a batch, the (store, array) pairs that are concatenated along channels, such as
            `{"level2": [(hiera, "level2/features"), (prithvi, "level2/features")]}`. Stores must be aligned; the
            arrays of a field must have the same dtype and the same shape except for channels.
        rows: indices of the samples to read, such as `store.rows("train")`; None for all.
        view: name of the augmented copy; None for the first.
        budget: bytes; if the rows fit, they are read once and stay in memory, else they are read as needed.
        empty: allocates the reused memory of `stream` from a shape and a dtype, for instance pinned memory.

    Attributes:
        stores: those of the fields, without duplicates.
        shapes, dtypes: of one sample, by field.
        rows: indices of the samples to read, int64 (sample,).
        in_memory: whether the rows are in memory.

    Raises StoreError if stores are not aligned, or arrays cannot be concatenated.
    """

    def __init__(
        self,
        fields: Mapping[str, Sequence[tuple[FeatureStore, str]]],
        rows: np.ndarray | None = None,
        view: str | None = None,
        budget: int = 0,
        empty: Empty = np.empty,
    ):
        self._arguments = (fields, rows, view, budget, empty)
        self._fields = {name: list(members) for name, members in fields.items()}
        if not self._fields or not all(self._fields.values()):
            raise StoreError(
                f"A FeatureDataset needs fields, each with at least one (store, array) pair; given {dict(fields)}.",
                key="fields", value=dict(fields),
            )  # fmt: skip
        self.stores = list({id(store): store for members in self._fields.values() for store, _ in members}.values())
        check_aligned(self.stores)
        self.shapes, self.dtypes = {}, {}
        for name, members in self._fields.items():
            self.shapes[name], self.dtypes[name] = _concatenated(name, members)
        n_samples = len(self.stores[0].sample)
        self.rows = self.stores[0].validate_index(np.arange(n_samples) if rows is None else rows)
        self._position_of_sample = np.full(n_samples, -1)
        self._position_of_sample[self.rows] = np.arange(len(self.rows))
        self._view, self._empty = view, empty
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self.in_memory = False
        row_bytes = sum(math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())
        if len(self.rows) * row_bytes <= budget:
            self._memory = self._read_all()
            self.in_memory = True

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int | Sequence[int]) -> dict[str, np.ndarray]:
        """Return one sample, or a batch of them, by position in `rows`."""
        if isinstance(position, (int, np.integer)):
            return {name: values[0] for name, values in self.get(self.rows[[position]]).items()}
        return self.get(self.rows[np.asarray(position, dtype=np.int64)])

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Return samples for a DataLoader that makes batches of them."""
        batch = self[positions]
        return [{name: values[number] for name, values in batch.items()} for number in range(len(positions))]

    def __reduce__(self):
        return FeatureDataset, self._arguments

    def get(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Return samples of the stores, (sample, channel, …) by field, in the order of `index`.

        Raises StoreError if a sample is not in `rows`, or a file is missing or damaged.
        """
        batch = self._allocate(len(index), np.empty)
        self._fill(batch, np.asarray(index))
        return batch

    def _allocate(self, count: int, empty: Empty) -> dict[str, np.ndarray]:
        return {name: empty((count, *shape), self.dtypes[name]) for name, shape in self.shapes.items()}

    def stream(self, order: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Yield (index, batch) for every index array of `order`; a thread reads ahead.

        The arrays of a batch are valid until the next batch is requested; their memory is reused. The iterator
        allocates two batches of the largest size. Leaving the loop early ends the thread.
        """
        free, ready, stop = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
        for _ in range(_N_BUFFERS):
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
            for index in map(np.asarray, order):
                buffer = free.get()
                if stop.is_set():
                    return
                if buffer is None or any(len(out) < len(index) for out in buffer.values()):
                    buffer = self._allocate(len(index), self._empty)
                self._fill(buffer, index)
                ready.put((index, buffer))
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    def _fill(self, out: Mapping[str, np.ndarray], index: np.ndarray) -> None:
        positions = self._positions(index)
        if self.in_memory:
            for name, values in self._memory.items():
                np.take(values, positions, axis=0, out=out[name][: len(index)], mode="clip")
            return
        requests = []
        for name, members in self._fields.items():
            start = 0  # arrays of one field go to adjacent channels
            for store, array_name in members:
                array = store.array(array_name)
                target = out[name][: len(index), start : start + array.shape[0]]
                requests.append(ReadRequest(array, store.row_index(index, self._view).tolist(), target))
                start += array.shape[0]
        process = os.getpid()  # a forked DataLoader worker creates its own pool
        if process not in self._pools:
            self._pools[process] = ThreadPoolExecutor(READ_THREADS)
        gather(requests, self._pools[process])

    def _read_all(self) -> dict[str, np.ndarray]:
        memory = self._allocate(len(self.rows), np.empty)
        for start in range(0, len(self.rows), _ROWS_PER_READ):
            part = slice(start, start + _ROWS_PER_READ)
            self._fill({name: out[part] for name, out in memory.items()}, self.rows[part])
        return memory

    def _positions(self, index: np.ndarray) -> np.ndarray:
        """Return the positions in `rows` of samples of the stores, int64 (sample,)."""
        positions = self._position_of_sample[self.stores[0].validate_index(index)]
        if len(positions) and positions.min() < 0:
            sample = int(index[np.argmin(positions)])
            message = f"Sample {sample} is not one of the rows of this FeatureDataset."
            raise StoreError(message, key="index", value=sample)
        return positions


def _concatenated(name: str, members: Sequence[tuple[FeatureStore, str]]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of one sample of arrays concatenated along channels."""
    arrays = [store.array(array_name) for store, array_name in members]
    if len({(array.shape[1:], array.dtype) for array in arrays}) > 1:
        descriptions = [
            f"{array_name} of {store.location} is {array.shape} {array.dtype}"
            for (store, array_name), array in zip(members, arrays, strict=True)
        ]
        raise StoreError(
            f"The arrays of '{name}' cannot be concatenated along channels: {', '.join(descriptions)}. Use a field "
            "for each.",
            key=f"fields.{name}", value=[array.shape for array in arrays],
        )  # fmt: skip
    return (sum(array.shape[0] for array in arrays), *arrays[0].shape[1:]), arrays[0].dtype


def shuffled_batches(rows: np.ndarray, batch: int, seed: int, epoch: int = 0) -> Iterator[np.ndarray]:
    """Yield the rows of one epoch in random order, `batch` at a time; the last batch can be smaller."""
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    for start in range(0, len(order), batch):
        yield order[start : start + batch]
