"""A lane's steps on a GPU, recorded once and repeated without Python (CUDA graphs).

A step of a small head is hundreds of kernels, each of which Python takes longer to launch than the GPU to run.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch


class GraphedStep:
    """One lane's steps, on the stream that is current whenever it is called.

    The first is done as it is, so that whatever is made once is there; the second is recorded, and repeated from then
    on. A recording knows addresses, not values: what changes from step to step is read from the device's memory.

    Args:
        update: one step, from rows (head, batch) and the share of the learning rate, a scalar on the device.
        orders: rows of all steps, (step, head, batch), on the device.
        factors: shares of the learning rate of all steps.
        pool: memory that recordings use one after the other, so those of one stream may share it
            (torch.cuda.graph_pool_handle).
    """

    def __init__(
        self,
        update: Callable[[torch.Tensor, torch.Tensor], None],
        orders: torch.Tensor,
        factors: Sequence[float],
        pool: tuple[int, int] | None = None,
    ):
        self._update, self._orders, self._pool = update, orders, pool
        self._factors = torch.tensor(factors, dtype=torch.float32, device=orders.device)
        self._place = torch.zeros(1, dtype=torch.long, device=orders.device)
        self._begun, self._graph = False, None

    def __call__(self) -> None:
        """The next step, begun."""
        if not self._begun:
            self.once()
            self._begun = True
            return
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()

    def once(self) -> None:
        """The next step, launched kernel by kernel."""
        index, factor = (each.index_select(0, self._place)[0] for each in (self._orders, self._factors))
        self._update(index, factor)
        self._place += 1

    def _record(self) -> torch.cuda.CUDAGraph:
        # torch.cuda.graph would wait for the whole device and give its memory back, for every head.
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(self._pool, capture_error_mode="thread_local")
        try:
            self.once()
        except BaseException:
            with suppress(RuntimeError):  # of a recording that the error has broken
                graph.capture_end()
            raise
        graph.capture_end()
        return graph
