"""Batches of images on their way to the device, made while those before are encoded."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import pairwise

import numpy as np
import torch
import xarray as xr

from cache.writer import Writer
from pipeline.backbones.encoder import Encoder
from pipeline.data.augmentation import VIEWS
from pipeline.data.image_store import UNLABELLED
from pipeline.extraction.transfer import HostToDevice, threads

# Batches made ahead, and threads that read a GPU's batch side by side: it computes faster than one reads.
_AHEAD, _THREADS = 3, 4


@contextmanager
def batches(images: xr.Dataset, encoder: Encoder, writer: Writer, batch: int):
    """Iterates over (shard, rows, given), the next of the images, which `arrived` takes on the device.

    A batch does not reach from one shard into the next: features depend in their last digits on what else is in a
    batch, and a run that resumes, or one of many workers, must make the same. Nor do samples without labels share
    one with others, so that these have the same features, and heads the same scores, whether they are there or not.
    """
    with threads(_THREADS, encoder.device) as readers:
        feed, unlabelled = (
            ImageLoader(images, encoder, writer.schema.views, readers),
            images.split.values == UNLABELLED,
        )
        given = (
            (number, rows, feed(rows))
            for number in writer.claim_shards()
            for rows in batch_slices(writer.schema.rows(number), batch, unlabelled)
        )
        with closing(given), threads(1, encoder.device) as thread:
            yield _prefetch(given, thread)


class ImageLoader:
    """Makes batches; called by one thread.

    Args:
        images: an images store, opened.
        views: names of the copies of each image; none for the images themselves.
        readers: threads that read for a GPU.
    """

    def __init__(self, images: xr.Dataset, encoder: Encoder, views: tuple[str, ...], readers: ThreadPoolExecutor):
        self._images, self._inputs, self._readers = images, encoder.preprocessor, readers
        self._views = [VIEWS[view] for view in views] or [lambda image: image]
        self._upload, self._read = HostToDevice(encoder.device), reader(images)
        self._chunk, self._on_gpu = chunk(images), encoder.device != "cpu"

    def __call__(self, rows: slice) -> tuple:
        """Images as the device wants them, a tensor a view, and their context."""
        tensors = self._by_many(rows) if self._on_gpu else self._by_one(rows)
        known = self._inputs.metadata(self._images, rows)
        return self._upload(tensors, {name: torch.from_numpy(each) for name, each in known.items()})

    def _by_one(self, rows: slice) -> list[torch.Tensor]:
        selected = self._inputs.select_bands(self._read(rows))
        return [torch.from_numpy(np.ascontiguousarray(view(selected))) for view in self._views]

    def _by_many(self, rows: slice) -> list[torch.Tensor]:
        """Chunks side by side, each right into the memory that a GPU copies from."""
        image = self._images.image
        whole = (rows.stop - rows.start, len(self._inputs.input_bands.band_indices), *image.shape[2:])
        dtype = torch.from_numpy(np.empty(0, image.dtype)).dtype
        shapes = [view(np.broadcast_to(np.empty(()), whole)).shape for view in self._views]
        tensors = [self._upload.empty(shape, dtype) for shape in shapes]

        def fill(some: slice) -> None:
            selected = self._inputs.select_bands(self._read(some))
            for view, tensor in zip(self._views, tensors, strict=True):
                tensor.numpy()[some.start - rows.start : some.stop - rows.start] = view(selected)

        list(self._readers.map(fill, chunk_slices(rows, self._chunk)))
        return tensors


def chunk(images: xr.Dataset) -> int:
    """Images in a file of the store."""
    return images.image.encoding.get("preferred_chunks", {}).get("sample", 1)


def chunk_slices(rows: slice, size: int) -> list[slice]:
    """Rows chunk by chunk; all together where they begin within a chunk, of which the reader keeps the rest."""
    if rows.start % size:
        return [rows]
    return [slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


def reader(images: xr.Dataset) -> Callable[[slice], np.ndarray]:
    """From rows to their images.

    Keeps the chunks last read for rows that end within one, since several batches may lie in it. Several threads may
    call it as long as only one at a time wants such rows.
    """
    size = chunk(images)
    held, begins = np.empty((0,)), 0

    def read(rows: slice) -> np.ndarray:
        nonlocal held, begins
        if rows.start % size == rows.stop % size == 0:
            return images.image[rows].values
        if not begins <= rows.start <= rows.stop <= begins + len(held):
            begins = rows.start // size * size
            held = images.image[begins : -(-rows.stop // size) * size].values
        return held[rows.start - begins : rows.stop - begins]

    return read


def batch_slices(rows: slice, batch: int, apart: np.ndarray) -> Iterator[slice]:
    """A shard's rows in batches, each of samples that are all `apart` (bool, of all samples) or none."""
    edges = np.flatnonzero(np.diff(apart[rows])) + rows.start + 1
    for first, last in pairwise([rows.start, *edges.tolist(), rows.stop]):
        for start in range(first, last, batch):
            yield slice(start, min(start + batch, last))


def _prefetch(items: Iterator, thread: ThreadPoolExecutor) -> Iterator:
    """The same items, each made by the thread while those before are used."""
    end = object()
    waiting = deque(thread.submit(next, items, end) for _ in range(_AHEAD))
    while (item := waiting.popleft().result()) is not end:
        waiting.append(thread.submit(next, items, end))
        yield item
