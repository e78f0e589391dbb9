"""Train and evaluate independent heads in parallel: one CPU core or one CUDA stream per head.

On a GPU the training steps are CUDA graphs, recorded once and then repeated without Python: a step of a small head is
hundreds of kernels, and Python takes longer to launch each than the GPU to run it.
"""

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache

import torch

from pipeline.heads.config import HeadGroup
from pipeline.training.feature_loader import SplitData, StreamedFeatures

# Concurrent heads on a GPU; the kernels of one head do not occupy it.
N_STREAMS = 4
# Values in pooled features above which one product on all cores is faster.
LARGE_INPUT_VALUES = 1 << 23


@contextmanager
def parallel_map(data: SplitData, group: HeadGroup) -> Iterator[Callable]:
    """Provide a `map` over independent groups of heads.

    On a CPU every group has one core: small convolutions and products scale badly to two cores, and torch's threads
    spin while they wait for each other. A head's result does not depend on other heads or on the number of cores.
    On a GPU, features in memory are evaluated by a few dense heads at once, each on its own stream. Stacked heads on
    a GPU or with large inputs are one product that occupies the device: a plain `map`.
    """
    device = data.label.device
    is_large = isinstance(data.inputs, torch.Tensor) and data.inputs.numel() > LARGE_INPUT_VALUES
    if group.is_stacked and (device.type != "cpu" or is_large):
        yield map
    elif device.type == "cpu":
        with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    elif isinstance(data.inputs, StreamedFeatures):  # batches arrive on one stream, which all groups share
        with deterministic_cudnn():
            yield map
    else:
        torch.cuda.synchronize(device)  # the streams of other threads read what this one has written
        free_streams = queue.SimpleQueue()
        for stream in cuda_streams(device):
            free_streams.put(stream)
        with (
            deterministic_cudnn(),
            ThreadPoolExecutor(N_STREAMS, initializer=lambda: torch.cuda.set_stream(free_streams.get())) as pool,
        ):
            yield pool.map
        torch.cuda.synchronize(device)


def deterministic_cudnn() -> AbstractContextManager:
    """Provide a context in which cuDNN's convolutions are deterministic.

    Do not use it for depthwise convolutions (students, backbones): cuDNN 9 has no deterministic algorithm and fails.
    """
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


@lru_cache
def cuda_streams(device: torch.device) -> list[torch.cuda.Stream]:
    """Return a GPU's streams for heads: always the same, because memory freed on a stream is reused on it."""
    return [torch.cuda.Stream(device) for _ in range(N_STREAMS)]


class GraphedStep:
    """The training steps of one head trainer, on the CUDA stream that is current at each call.

    The first step runs without a graph, so that everything allocated once exists. The second is recorded; it and all
    later ones are replays. A graph records addresses, so what changes from step to step is read from device memory.

    Args:
        update: one step, from rows (head, batch) and the factor of the learning rate, a scalar on the device.
        orders: rows of all steps, (step, head, batch), on the device.
        pool: memory pool (torch.cuda.graph_pool_handle), shared by the graphs of one stream.
    """

    def __init__(
        self, update: Callable[[torch.Tensor, torch.Tensor], None], orders: torch.Tensor,
        lr_factors: Sequence[float], pool: tuple[int, int] | None,
    ):  # fmt: skip
        self._update, self.orders, self._pool = update, orders, pool
        self._lr_factors = torch.tensor(lr_factors, dtype=torch.float32, device=orders.device)
        self._step = torch.zeros(1, dtype=torch.long, device=orders.device)
        self._has_started = False
        self._graph: torch.cuda.CUDAGraph | None = None

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
        index, lr_factor = (values.index_select(0, self._step)[0] for values in (self.orders, self._lr_factors))
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
