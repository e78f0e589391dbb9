"""Images per forward, where params.yaml leaves it open; it decides the features' last digits."""

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from cache.atomic import write_file
from cache.errors import StoreError
from cache.reader import FeatureStore
from pipeline.backbones.encoder import Encoder
from pipeline.extraction.estimate import translate_errors

# On a CPU, where larger ones are slower, since more of a layer's output leaves the cache, and take more memory
# (benchmarks/choices.py); and the share of a GPU's memory to use: narrowing takes some, too.
_CPU_BATCH, _SHARE = 4, 0.8


def shared_choice(path: Path, find: Callable[[], int]) -> int:
    """What the first worker of a store finds, kept at `path`: on another GPU another may find another."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        write_file(mine, [str(find()).encode()])
        with suppress(FileExistsError):
            os.link(mine, path)
        mine.unlink()
    return int(path.read_text())


def batch_of_existing_store(final: Path, said: Mapping, views: Sequence[str]) -> int:
    """The batch of a finished store of the same things, or 0.

    Args:
        said: what decides its content, but the batch.
        views: names of the copies of each image.
    """
    try:
        store = FeatureStore(final)
    except (StoreError, OSError):
        return 0
    told = json.loads(json.dumps(dict(said)))
    same = all(store.attributes.get(name) == value for name, value in told.items())
    return store.attributes.get("batch", 0) if same and (store.view or ("identity",)) == tuple(views) else 0


def find_batch_size(images: xr.Dataset, encoder: Encoder, most: int, views: int = 1) -> int:
    """A batch for `extract.batch: 0`: a few on a processor, on a GPU a power of two that its memory holds with room.

    It goes by all of the GPU's memory but what this process has of it, the network, and not by what others leave
    free: another batch would make other last digits.

    Args:
        most: the largest to find.
        views: copies of an image that are in memory together.

    Raises:
        UserError: a network that these images do not fit, or no memory.
    """
    if encoder.device == "cpu":
        return min(_CPU_BATCH, most)
    # Not compiled, which would be done again for several sizes.
    plain = Encoder(encoder.preprocessor, encoder.network, encoder.device, encoder.precision, strides=encoder.strides)
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
    image, known = images.image[rows].values, encoder.preprocessor.metadata(images, rows)
    torch.cuda.reset_peak_memory_stats(encoder.device)
    before = torch.cuda.memory_allocated(encoder.device)
    with translate_errors(encoder, batch):
        pyramid = encoder(image, known)
    forward = torch.cuda.max_memory_allocated(encoder.device) - before
    made = sum(each.nbytes for each in [*pyramid.levels, *pyramid.pooled.values()])
    return max(forward + (views - 1) * made, 2 * views * made)
