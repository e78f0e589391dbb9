"""Images per forward, where params.yaml leaves it open; it decides the features' last digits."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from cache.durable import write_file
from pipeline.encoding.encode import Encoder
from pipeline.extraction.preflight import explained

# On a CPU, where larger ones are slower, since more of a layer's output leaves the cache, and take more memory
# (benchmarks/choices.py); and the share of a GPU's memory to use: narrowing takes some, too.
_CPU_BATCH, _SHARE = 4, 0.8


def agreed(path: Path, find: Callable[[], int]) -> int:
    """What the first worker of a store finds, kept at `path`: on another GPU another may find another."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        write_file(mine, [str(find()).encode()])
        with suppress(FileExistsError):
            os.link(mine, path)
        mine.unlink()
    return int(path.read_text())


def largest(images: xr.Dataset, encoder: Encoder, most: int, views: int = 1) -> int:
    """A batch for `extract.batch: 0`: on a GPU the largest power of two that its memory holds with room to spare.

    It goes by all of the GPU's memory, not by what happens to be free: another batch would make other last digits.

    Args:
        most: the largest to find.
        views: copies of an image that are in memory together.

    Raises:
        UserError: a network that these images do not fit, or no memory.
    """
    if encoder.device == "cpu":
        return _CPU_BATCH
    # Not compiled, which would be done again for several sizes.
    plain = Encoder(encoder.inputs, encoder.network, encoder.device, encoder.precision, strides=encoder.strides)
    whole = torch.cuda.get_device_properties(encoder.device).total_memory
    room = _SHARE * (whole - torch.cuda.memory_allocated(encoder.device))
    batch = _doubled(most, room, lambda batch: _bytes_of(images, plain, batch, views))
    torch.cuda.empty_cache()
    return batch


def _doubled(most: int, room: float, needs: Callable[[int], float]) -> int:
    """The largest power of two, up to `most`, that fits into `room` by what half of it needs."""
    batch = 1
    while 2 * batch <= most and 2 * needs(batch) <= room:
        batch *= 2
    return batch


def _bytes_of(images: xr.Dataset, encoder: Encoder, batch: int, views: int) -> int:
    """What a batch takes of a GPU: one view's forward beside what the others made, or all of them joined."""
    rows = np.zeros(batch, int)
    torch.cuda.reset_peak_memory_stats(encoder.device)
    before = torch.cuda.memory_allocated(encoder.device)
    with explained(encoder, batch):
        pyramid = encoder(images.image[rows].values, encoder.inputs.where_and_when(images, rows))
    forward = torch.cuda.max_memory_allocated(encoder.device) - before
    made = sum(each.nbytes for each in [*pyramid.levels, *pyramid.pooled.values()])
    return max(forward + (views - 1) * made, 2 * views * made)
