"""Encode stored images: select bands, preprocess, run the backbone, check the shapes.

Extraction, maps and fine-tuning all use this module, so that no step is forgotten or done twice. On a CPU, batches
are encoded in parallel, each with some of the threads; on a GPU, sequentially.
"""

import copy
import os
import queue
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch.nn.utils import convert_conv2d_weight_memory_format

from pipeline.backbones.base import FeaturePyramid
from pipeline.backbones.preprocessing import Preprocessor
from pipeline.device import disable_tf32
from pipeline.errors import UserError

# On a CPU torch allocates memory for every layer's output; huge pages make that cheaper.
# torch reads this variable when it creates its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Batches at the same time on a CPU; each needs memory.
_MAX_PARALLEL = 2


class PyramidNetwork(torch.nn.Module):
    """A network, from images (batch, band, y, x) to a pyramid.

    `get_outputs(network, image, **metadata)` returns the outputs that become its levels, as for
    `FeaturePyramid.from_outputs`. By default it calls the network.
    """

    def __init__(self, network: torch.nn.Module, get_outputs: Callable = lambda network, image: network(image)):
        super().__init__()
        self.network, self.get_outputs = network, get_outputs

    def forward(self, image: torch.Tensor, **metadata: torch.Tensor) -> FeaturePyramid:
        outputs = self.get_outputs(self.network, image, **metadata)
        return FeaturePyramid.from_outputs(outputs, image.shape[-1])


def compute_in_float32(module: torch.nn.Module) -> None:
    """Exclude a module from autocast: bfloat16 rounds neighbouring years or wavelengths to one value."""
    forward = module.forward

    def forward_in_float32(values: torch.Tensor, *args, **kwargs):
        with torch.autocast(values.device.type, enabled=False):
            return forward(values.float(), *args, **kwargs)

    module.forward = forward_in_float32


class Encoder:
    """Encodes batches of one dataset's images with one frozen backbone.

    Args:
        device: `cpu`, `cuda`, or one GPU such as `cuda:1`.
        precision: of the forward pass: `float32`, or autocast to `bfloat16` or `float16`.
        compiled: whether to use torch.compile.
        strides: input pixels per cell of each level, as in the spec; empty if unknown.
    """

    def __init__(
        self, preprocessor: Preprocessor, network: torch.nn.Module, device: str, precision: str = "float32",
        compiled: bool = False, strides: Sequence[int] = (),
    ):  # fmt: skip
        self.device = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
        self.preprocessor, self.precision, self.strides = preprocessor, precision, strides
        # Channels last is as fast on a CPU, and GPUs need it in low precision.
        self.network = convert_conv2d_weight_memory_format(network.to(self.device), torch.channels_last)
        self._compiled = compiled
        self._forward = torch.compile(self.network) if compiled else self.network

    def clone_sharing_weights(self) -> "Encoder":
        """Return another encoder with the same weights in memory, for a concurrent forward pass.

        Some networks store intermediate results in their modules, such as timm's feature hooks. Two forward passes
        through one network would mix these up without an error.
        """
        shared = {id(tensor): tensor for tensor in [*self.network.parameters(), *self.network.buffers()]}
        network = copy.deepcopy(self.network, shared)
        return Encoder(self.preprocessor, network, self.device, self.precision, self._compiled, self.strides)

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """Make the network's input, float32 (batch, band, input_size, input_size), on the device.

        `image` is (batch, band, y, x) in the images store's units.
        """
        return self.preprocessor(torch.from_numpy(self.preprocessor.select_bands(image)).to(self.device))

    def __call__(self, image: np.ndarray, metadata: Mapping[str, np.ndarray] | None = None) -> FeaturePyramid:
        """Compute the features of a batch, as float32 NumPy arrays.

        Args:
            image: (batch, band, y, x) in the images store's units.
            metadata: `Preprocessor.metadata` of the same samples; None if unknown.

        Raises UserError: the network returns other shapes than its spec states.
        """
        tensors = {name: torch.from_numpy(values).to(self.device) for name, values in (metadata or {}).items()}
        pyramid = self.forward(self.prepare(image), tensors)
        return FeaturePyramid(
            [level.float().cpu().numpy() for level in pyramid.levels],
            {name: vector.float().cpu().numpy() for name, vector in pyramid.pooled.items()},
        )

    def forward(self, batch: torch.Tensor, metadata: Mapping[str, torch.Tensor]) -> FeaturePyramid:
        """Compute the features of preprocessed images, as tensors on the device; arguments as for `__call__`."""
        # Importing terratorch 1.2 sets this to "medium" for the whole process. Float32 convolutions then run in
        # bfloat16 on CPUs that can, with errors of some percent.
        torch.set_float32_matmul_precision("highest")
        disable_tf32()
        dtype, device_type = PRECISIONS[self.precision], torch.device(self.device).type
        with torch.inference_mode(), torch.autocast(device_type, dtype=dtype, enabled=dtype is not None):
            pyramid = self._forward(batch, **metadata)
        self._check_shapes(pyramid)
        return pyramid

    def _check_shapes(self, pyramid: FeaturePyramid) -> None:
        side = self.preprocessor.input_bands.input_size
        strides: Sequence[int | None] = self.strides or [None] * len(pyramid.levels)
        for level, stride in zip(pyramid.levels, strides, strict=True):
            shape = tuple(level.shape)
            if len(shape) != 4 or shape[2] != shape[3] or (stride and shape[2] != side // stride):
                expected = f"{side // stride}x{side // stride} cells" if stride else "square maps"
                raise UserError(
                    f"The backbone returned a level of shape {shape} for an input of {side} px; expected {expected}. "
                    "Check the backbone's layers and input_size in params.yaml.",
                    key="strides" if stride else "layers", value=shape,
                )  # fmt: skip


class ParallelEncoder:
    """Runs functions that encode, two at the same time on a CPU with several threads; a context manager.

    The threads of one forward pass wait for each other in every layer, and for the slowest when other work needs a
    core. Parallel forward passes with fewer threads each do not. The functions get the encoder, or a clone of it that
    shares its weights.
    """

    def __init__(self, encoder: Encoder):
        self._n_threads = torch.get_num_threads()
        self._n_parallel = min(_MAX_PARALLEL, self._n_threads) if encoder.device == "cpu" else 1
        self._free_encoders: queue.SimpleQueue[Encoder] = queue.SimpleQueue()
        for number in range(self._n_parallel):
            self._free_encoders.put(encoder.clone_sharing_weights() if number else encoder)
        self._pool = device_threads(self._n_parallel, encoder.device, self._n_threads // self._n_parallel)
        self._running: deque[Future] = deque()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._n_threads)  # setting it in one thread changes it for later threads, too

    def submit(self, function: Callable, *args) -> Future:
        """Queue `function(encoder, *args)`. Wait while another is queued; raise the error of a finished call."""
        while self._running and (len(self._running) > self._n_parallel or self._running[0].done()):
            self._running.popleft().result()
        self._running.append(self._pool.submit(self._run, function, *args))
        return self._running[-1]

    def _run(self, function: Callable, *args):
        encoder = self._free_encoders.get()
        try:
            return function(encoder, *args)
        finally:
            self._free_encoders.put(encoder)


def device_threads(n_threads: int, device: str, torch_threads: int | None = None) -> ThreadPoolExecutor:
    """Make threads that use this device; by default a new thread uses the first GPU.

    On a CPU, torch's operations use `torch_threads` threads in each of them; by default as many as in this one.
    """
    if device != "cpu":
        return ThreadPoolExecutor(n_threads, initializer=torch.cuda.set_device, initargs=(device,))
    n_inner = torch_threads or torch.get_num_threads()

    def set_torch_threads() -> None:
        # A thread's first operation takes the number that any thread set last; the rounding of sums depends on it.
        torch.get_num_threads()  # is such an operation
        torch.set_num_threads(n_inner)

    return ThreadPoolExecutor(n_threads, initializer=set_torch_threads)
