"""Training steps as CUDA graphs: recorded once, then repeated without Python.

A step of a small head is hundreds of kernels; Python takes longer to launch each than the GPU to run it.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch


class GraphedStep:
    """The training steps of one head trainer, on the CUDA stream that is current at each call.

    The first step runs without a graph, so that everything allocated once exists. The second is recorded; it and all
    later ones are replays. A graph records addresses, not values: what changes from step to step is read from device
    memory.

    Args:
        update: one step, from rows (head, batch) and the factor of the learning rate, a scalar on the device.
        orders: rows of all steps, (step, head, batch), on the device.
        lr_factors: factors of the learning rate of all steps.
        pool: memory pool (torch.cuda.graph_pool_handle) shared by the graphs of one stream, which run one after the
            other.
    """

    def __init__(
        self,
        update: Callable[[torch.Tensor, torch.Tensor], None],
        orders: torch.Tensor,
        lr_factors: Sequence[float],
        pool: tuple[int, int] | None = None,
    ):
        self._update, self._orders, self._pool = update, orders, pool
        self._lr_factors = torch.tensor(lr_factors, dtype=torch.float32, device=orders.device)
        self._step = torch.zeros(1, dtype=torch.long, device=orders.device)
        self._has_started, self._graph = False, None

    def __call__(self) -> None:
        """Start the next step."""
        if not self._has_started:
            self.run_eagerly()
            self._has_started = True
            return
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()

    def run_eagerly(self) -> None:
        """Start the next step, kernel by kernel."""
        index, lr_factor = (values.index_select(0, self._step)[0] for values in (self._orders, self._lr_factors))
        self._update(index, lr_factor)
        self._step += 1

    def _record(self) -> torch.cuda.CUDAGraph:
        # torch.cuda.graph would synchronize the whole device and release its memory, for every head.
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(self._pool, capture_error_mode="thread_local")
        try:
            self.run_eagerly()
        except BaseException:
            with suppress(RuntimeError):  # from ending a capture that the error has invalidated
                graph.capture_end()
            raise
        graph.capture_end()
        return graph
