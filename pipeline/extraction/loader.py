"""Load batches of images ahead of the encoder, and copy them to the device and features back.

On a GPU each direction has its own stream, ordered by events. On a CPU nothing is copied.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import xarray as xr

from cache.writer import Writer
from pipeline.backbones.encoder import Encoder
from pipeline.data.augmentation import VIEWS
from pipeline.data.image_store import UNLABELLED

# Batches loaded ahead, and threads that read a batch for a GPU, which computes faster than one thread reads.
_PREFETCHED_BATCHES, _READ_THREADS = 3, 4


# Batches of images


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

    Args:
        batch: images per forward pass.
    """
    with device_threads(_READ_THREADS, encoder.device) as readers:
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
    """Loads batches of an images store; called by one thread.

    Args:
        views: names of the augmented copies of each image; empty for the images themselves.
        readers: threads that read for a GPU.
    """

    def __init__(self, images: xr.Dataset, encoder: Encoder, views: Sequence[str], readers: ThreadPoolExecutor):
        self._images, self._preprocessor, self._readers = images, encoder.preprocessor, readers
        self._views = [VIEWS[view] for view in views] or [lambda image: image]
        self._upload, self._read = HostToDevice(encoder.device), make_reader(images)
        self._chunk_size, self._is_gpu = chunk_size(images), encoder.device != "cpu"

    def __call__(self, rows: slice) -> LoadedBatch:
        """Load rows and start their upload."""
        tensors = self._read_in_parallel(rows) if self._is_gpu else self._read_serially(rows)
        metadata = self._preprocessor.metadata(self._images, rows)
        return self._upload(tensors, {name: torch.from_numpy(values) for name, values in metadata.items()})

    def _read_serially(self, rows: slice) -> list[torch.Tensor]:
        selected = self._preprocessor.select_bands(self._read(rows))
        return [torch.from_numpy(np.ascontiguousarray(view(selected))) for view in self._views]

    def _read_in_parallel(self, rows: slice) -> list[torch.Tensor]:
        """Read chunks in parallel, each directly into the memory that the GPU copies from."""
        image = self._images.image
        n_bands = len(self._preprocessor.input_bands.band_indices)
        batch_shape = (rows.stop - rows.start, n_bands, *image.shape[2:])
        dtype = torch.from_numpy(np.empty(0, image.dtype)).dtype
        shapes = [view(np.broadcast_to(np.empty(()), batch_shape)).shape for view in self._views]
        tensors = [self._upload.empty(shape, dtype) for shape in shapes]

        def fill(chunk: slice) -> None:
            selected = self._preprocessor.select_bands(self._read(chunk))
            for view, tensor in zip(self._views, tensors, strict=True):
                tensor.numpy()[chunk.start - rows.start : chunk.stop - rows.start] = view(selected)

        list(self._readers.map(fill, chunk_slices(rows, self._chunk_size)))
        return tensors


def chunk_size(images: xr.Dataset) -> int:
    """Return the number of images per file of an images store."""
    return images.image.encoding.get("preferred_chunks", {}).get("sample", 1)


def chunk_slices(rows: slice, size: int) -> list[slice]:
    """Split rows at the edges of files.

    Rows that begin within a file stay together, since the reader caches the file.
    """
    if rows.start % size:
        return [rows]
    return [slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


def make_reader(images: xr.Dataset) -> Callable[[slice], np.ndarray]:
    """Return a function from rows to their images, (sample, band, y, x).

    Rows that begin or end within a file are read with all rows of their files, which are cached, since several
    batches may be in one file. Several threads may call the function, if at most one at a time passes such rows.
    """
    size = chunk_size(images)
    cached, cached_start = np.empty((0,)), 0

    def read(rows: slice) -> np.ndarray:
        nonlocal cached, cached_start
        if rows.start % size == rows.stop % size == 0:
            return images.image[rows].values
        if not cached_start <= rows.start <= rows.stop <= cached_start + len(cached):
            cached_start = rows.start // size * size
            cached = images.image[cached_start : -(-rows.stop // size) * size].values
        return cached[rows.start - cached_start : rows.stop - cached_start]

    return read


def batch_slices(rows: slice, batch: int, is_separate: np.ndarray) -> Iterator[slice]:
    """Split a shard's rows into batches that do not mix samples of both values of `is_separate`.

    Args:
        batch: samples per batch.
        is_separate: bool, of all samples of the store.
    """
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


# Copies between host and device


def device_threads(n_threads: int, device: str) -> ThreadPoolExecutor:
    """Make threads that use this device; by default a new thread uses the first GPU."""
    if device == "cpu":
        return ThreadPoolExecutor(n_threads)
    return ThreadPoolExecutor(n_threads, initializer=torch.cuda.set_device, initargs=(device,))


class HostToDevice:
    """Copies batches to the device; called by one thread.

    Args:
        device: `cpu`, or one GPU such as `cuda:1`.
    """

    def __init__(self, device: str):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device != "cpu" else None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Allocate host memory that a GPU copies from directly."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=self._stream is not None)

    def __call__(self, images: Sequence[torch.Tensor], metadata: Mapping[str, torch.Tensor]) -> LoadedBatch:
        """Start the copies."""
        if self._stream is None:
            return LoadedBatch(list(images), dict(metadata), None)
        with torch.cuda.stream(self._stream):
            on_device = [image.pin_memory().to(self._device, non_blocking=True) for image in images]
            metadata_on_device = {
                name: values.pin_memory().to(self._device, non_blocking=True) for name, values in metadata.items()
            }
            return LoadedBatch(on_device, metadata_on_device, self._stream.record_event())


def wait_for_upload(batch: LoadedBatch) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Make the GPU's stream, not the CPU, wait for a batch; return its images and metadata."""
    if batch.uploaded is not None:
        stream = torch.cuda.current_stream(batch.images[0].device)
        stream.wait_event(batch.uploaded)
        for tensor in [*batch.images, *batch.metadata.values()]:
            tensor.record_stream(stream)  # allocated by another stream, which must not reuse the memory yet
    return batch.images, batch.metadata


class DeviceToHost:
    """Copies features from the device into memory that `empty` allocated.

    Args:
        device: `cpu`, or one GPU such as `cuda:1`.
    """

    def __init__(self, device: str):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device != "cpu" else None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Allocate host memory that a GPU copies into without waiting."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=self._stream is not None)

    def copy(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Start a copy; `target` is filled once the next `event` has passed."""
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
