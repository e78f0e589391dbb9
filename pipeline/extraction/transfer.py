"""Moving batches to the device that computes and features back, while it computes.

On a GPU each direction has its own stream, ordered by events; on a processor nothing moves.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def threads(count: int, device: str) -> ThreadPoolExecutor:
    """Threads that use this device: each begins at the first GPU, whichever its process uses."""
    own = {} if device == "cpu" else {"initializer": torch.cuda.set_device, "initargs": (device,)}
    return ThreadPoolExecutor(count, **own)


class HostToDevice:
    """Batches on their way to the device; called by one thread.

    Args:
        device: `cpu`, or one GPU such as `cuda:1`.
    """

    def __init__(self, device: str):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device != "cpu" else None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the processor that a GPU copies from without another copy."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=self._stream is not None)

    def __call__(self, tensors: Sequence[torch.Tensor], known: Mapping[str, torch.Tensor]) -> tuple:
        """(tensors, known, event): on the device once the event has passed, which `arrived` waits for."""
        if self._stream is None:
            return list(tensors), dict(known), None
        with torch.cuda.stream(self._stream):
            moved = [tensor.pin_memory().to(self._device, non_blocking=True) for tensor in tensors]
            context = {name: each.pin_memory().to(self._device, non_blocking=True) for name, each in known.items()}
            return moved, context, self._stream.record_event()


def wait_for_upload(given: tuple) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """What `Upload` gave, for use by kernels that are launched from here on; the processor does not wait."""
    tensors, known, event = given
    if event is not None:
        here = torch.cuda.current_stream(tensors[0].device)
        here.wait_event(event)
        for tensor in [*tensors, *known.values()]:
            tensor.record_stream(here)  # their memory is another stream's
    return tensors, known


class DeviceToHost:
    """Features on their way back, into memory that `empty` made."""

    def __init__(self, device: str):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device != "cpu" else None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the processor that a GPU copies into without waiting."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=self._stream is not None)

    def copy(self, into: torch.Tensor, values: torch.Tensor) -> None:
        """Begin to copy; `into` is filled once the next `event` has passed."""
        if self._stream is None:
            into.copy_(values)
            return
        values = values.contiguous()  # strided copies between a device and a host are made row by row
        ready = torch.cuda.current_stream(self._device).record_event()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            into.copy_(values, non_blocking=True)
            values.record_stream(self._stream)

    def event(self):
        """Passes when every copy begun until now is done; None where copies are done at once."""
        return self._stream.record_event() if self._stream is not None else None
