"""Heads side by side: a core each, a stream each, or one after the other."""

import queue
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache

import torch

from pipeline.training.feature_loader import Data, StreamedFeatures

# Heads at once on a GPU, which the kernels of one do not fill.
_STREAMS = 4
# Values in pooled vectors above which a product over all of them is worth every core.
_LARGE = 1 << 23


@contextmanager
def parallel_map(data: Data, group: torch.nn.Module):
    """A `map` over lanes: a core a lane, or one lane after the other where one lane keeps the device busy.

    On a GPU a few dense heads are evaluated at once, each on a stream of its own, if features are kept there.

    Small convolutions and small products keep one core busy and not two: a core a lane is faster than every core on
    each lane in turn, much faster where others use the machine too, since torch's threads wait for one another by
    spinning; and a head's numbers depend neither on the others nor on how many cores there are.
    """
    large = isinstance(data.inputs, torch.Tensor) and data.inputs.numel() > _LARGE
    on_gpu = data.label.device.type != "cpu"
    if group.stacked and (on_gpu or large):
        yield map
        return
    if on_gpu and isinstance(data.inputs, StreamedFeatures):  # batches come through one stream, which all lanes share
        with deterministic_cudnn():
            yield map
        return
    if on_gpu:
        torch.cuda.synchronize(data.label.device)  # what streams of other threads are about to read is there
        free = queue.SimpleQueue()
        for stream in streams(data.label.device):
            free.put(stream)
        own = {"initializer": lambda: torch.cuda.set_stream(free.get())}
        with deterministic_cudnn(), ThreadPoolExecutor(_STREAMS, **own) as pool:
            yield pool.map
        torch.cuda.synchronize(data.label.device)
        return
    cores = torch.get_num_threads()
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool.map


def deterministic_cudnn():
    """cuDNN's convolutions such that a head's numbers are the same each time.

    (cuDNN 9 has no such way for convolutions of a channel each, which students and backbones have, and fails.)
    """
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


@lru_cache
def streams(device: torch.device) -> list[torch.cuda.Stream]:
    """A GPU's streams for heads, always the same: memory that one has freed is its own."""
    return [torch.cuda.Stream(device) for _ in range(_STREAMS)]
