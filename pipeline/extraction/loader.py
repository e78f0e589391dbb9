"""Load batches of images ahead of the encoder, and copy them to the device and features back.

On a GPU each direction has its own stream, ordered by events. On a CPU nothing is copied.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
import xarray as xr

from cache.writer import Writer
from pipeline.backbones.encoder import Encoder, device_threads
from pipeline.backbones.preprocessing import chunk_size
from pipeline.data.augmentation import VIEWS
from pipeline.data.image_store import UNLABELLED

# Batches loaded ahead; threads that read a batch for a GPU, which computes faster than one thread reads; and files
# in memory, since a batch may end within one.
_PREFETCHED_BATCHES, _READ_THREADS, _CACHED_FILES = 3, 4, 2


@dataclass(frozen=True)
class LoadedBatch:
    """A batch on its way to the device; pass it to `wait_for_upload` before use.

    Attributes:
        images: selected bands, (sample, band, y, x) in the store's units, a tensor per view.
        metadata: `Preprocessor.metadata`, as tensors.
        uploaded: event after which the tensors are on the device; None on a CPU.
    """

    images: list[torch.Tensor]
    metadata: dict[str, torch.Tensor]
    uploaded: torch.cuda.Event | None


@contextmanager
def load_batches(images: xr.Dataset, encoder: Encoder, writer: Writer, batch: int):
    """Open an iterator over (shard, rows, `LoadedBatch`) of all shards that the writer claims.

    A batch never spans two shards: floating-point rounding of features depends on the other samples of the batch, and
    a resumed run, or one of many workers, must write the same bytes. Nor does a batch mix labelled and unlabelled
    samples, so that the features of labelled ones do not depend on whether there are unlabelled ones.
    """
    n_readers = 1 if encoder.device == "cpu" else _READ_THREADS
    with device_threads(n_readers, encoder.device) as readers:
        loader = ImageLoader(images, encoder, writer.schema.views, readers)
        is_unlabelled = images.split.values == UNLABELLED
        batches = (
            (shard, rows, loader(rows))
            for shard in writer.claim_shards()
            for rows in batch_slices(writer.schema.rows(shard), batch, is_unlabelled)
        )
        with closing(batches), device_threads(1, encoder.device) as thread:
            yield _prefetch(batches, thread)


class ImageLoader:
    """Loads batches of an images store, file by file; called by one thread.

    `views` are names of augmented copies of each image; if empty, the images themselves are loaded.
    """

    def __init__(self, images: xr.Dataset, encoder: Encoder, views: Sequence[str], readers: ThreadPoolExecutor):
        self._images, self._preprocessor, self._readers = images, encoder.preprocessor, readers
        self._views = [VIEWS[view] for view in views] or [lambda image: image]
        self._copies, self._file_size = DeviceCopies(encoder.device), chunk_size(images)
        self._read_file = lru_cache(_CACHED_FILES)(self._read_file_uncached)

    def __call__(self, rows: slice) -> LoadedBatch:
        """Load rows and start their upload."""
        image, n_bands = self._images.image, len(self._preprocessor.input_bands.band_indices)
        example = np.empty((rows.stop - rows.start, n_bands, *image.shape[2:]), image.dtype)  # only for its shape
        dtype = torch.from_numpy(example).dtype
        tensors = [self._copies.empty(view(example).shape, dtype) for view in self._views]

        def fill(number: int) -> None:
            """Copy a file's rows directly into the memory that a GPU copies from."""
            start = number * self._file_size
            first, last = max(rows.start, start), min(rows.stop, start + self._file_size)
            selected = self._preprocessor.select_bands(self._read_file(number)[first - start : last - start])
            for view, tensor in zip(self._views, tensors, strict=True):
                tensor.numpy()[first - rows.start : last - rows.start] = view(selected)

        list(self._readers.map(fill, range(rows.start // self._file_size, -(-rows.stop // self._file_size))))
        metadata = self._preprocessor.metadata(self._images, rows)
        return LoadedBatch(
            [self._copies.upload(tensor) for tensor in tensors],
            {name: self._copies.upload(torch.from_numpy(values)) for name, values in metadata.items()},
            self._copies.event(),
        )

    def _read_file_uncached(self, number: int) -> np.ndarray:
        return self._images.image[number * self._file_size : (number + 1) * self._file_size].values


def batch_slices(rows: slice, batch: int, is_separate: np.ndarray) -> Iterator[slice]:
    """Split a shard's rows into batches that do not mix both values of `is_separate`, of all samples."""
    edges = np.flatnonzero(np.diff(is_separate[rows])) + rows.start + 1
    for first, last in pairwise([rows.start, *edges.tolist(), rows.stop]):
        for start in range(first, last, batch):
            yield slice(start, min(start + batch, last))


def _prefetch(batches: Iterator, thread: ThreadPoolExecutor) -> Iterator:
    """Yield the same batches; the thread makes the next ones meanwhile."""
    end = object()
    waiting = deque(thread.submit(next, batches, end) for _ in range(_PREFETCHED_BATCHES))
    while (batch := waiting.popleft().result()) is not end:
        waiting.append(thread.submit(next, batches, end))
        yield batch


class DeviceCopies:
    """Copies in one direction between host and device, in a stream of their own; on a CPU nothing waits."""

    def __init__(self, device: str):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device != "cpu" else None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Allocate host memory that a GPU copies from and into without waiting."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=self._stream is not None)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """Start to copy a tensor to the device; wait for the next `event` before use."""
        if self._stream is None:
            return tensor
        with torch.cuda.stream(self._stream):
            return tensor.pin_memory().to(self._device, non_blocking=True)

    def copy(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Start a copy from the device; `target` is filled once the next `event` has passed."""
        if self._stream is None:
            target.copy_(values)
            return
        values = values.contiguous()  # strided copies between device and host are made row by row
        ready = torch.cuda.current_stream(self._device).record_event()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            target.copy_(values, non_blocking=True)
            values.record_stream(self._stream)

    def event(self) -> torch.cuda.Event | None:
        """Return an event that passes when all copies started so far are done; None if copies are immediate."""
        return self._stream.record_event() if self._stream is not None else None


def wait_for_upload(batch: LoadedBatch) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Make the GPU's stream, not the CPU, wait for a batch; return its images and metadata."""
    if batch.uploaded is not None:
        stream = torch.cuda.current_stream(batch.images[0].device)
        stream.wait_event(batch.uploaded)
        for tensor in [*batch.images, *batch.metadata.values()]:
            tensor.record_stream(stream)  # allocated by another stream, which must not reuse the memory yet
    return batch.images, batch.metadata
