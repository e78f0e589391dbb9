"""Encode stored images: select bands, preprocess, run the backbone, check the shapes.

Nothing else calls a backbone, so that no step is forgotten or done twice.
"""

import copy
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.nn.utils import convert_conv2d_weight_memory_format

from pipeline.backbones.base import FeaturePyramid
from pipeline.backbones.preprocessing import Preprocessor
from pipeline.device import disable_tf32
from pipeline.errors import UserError

# On a CPU torch allocates memory for every layer's output; huge pages make that cheaper (benchmarks/choices.py).
# torch reads this variable when it creates its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Encoder:
    """Encodes batches of one dataset's images with one frozen backbone.

    Args:
        preprocessor: makes the network's input.
        network: the backbone.
        device: `cpu`, `cuda`, or one GPU such as `cuda:1`.
        precision: of the forward pass: `float32`, or autocast to `bfloat16` or `float16`.
        compiled: whether to use torch.compile.
        strides: input pixels per cell of each level, as in the spec; empty if unknown.
    """

    def __init__(
        self,
        preprocessor: Preprocessor,
        network: torch.nn.Module,
        device: str,
        precision: str = "float32",
        compiled: bool = False,
        strides: Sequence[int] = (),
    ):
        self.device = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
        self.preprocessor, self.strides = preprocessor, strides
        self.precision = precision
        # Channels last is as fast on a CPU (benchmarks/choices.py), and GPUs need it in low precision.
        self.network = convert_conv2d_weight_memory_format(network.to(self.device), torch.channels_last)
        self._compiled = compiled
        self._forward = torch.compile(self.network) if compiled else self.network

    def clone_sharing_weights(self) -> "Encoder":
        """Return another encoder with the same weights in memory, for a concurrent forward pass.

        Some networks store intermediate results in themselves, such as timm's feature hooks. Two forward passes
        through one network would mix these up without an error.
        """
        shared = {id(tensor): tensor for tensor in [*self.network.parameters(), *self.network.buffers()]}
        network = copy.deepcopy(self.network, shared)
        return Encoder(self.preprocessor, network, self.device, self.precision, self._compiled, self.strides)

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """Make the network's input, float32 (batch, band, input_size, input_size), on the device.

        Args:
            image: (batch, band, y, x) in the images store's units.
        """
        return self.preprocessor(torch.from_numpy(self.preprocessor.select_bands(image)).to(self.device))

    def __call__(self, image: np.ndarray, metadata: Mapping[str, np.ndarray] | None = None) -> FeaturePyramid:
        """Compute the features of a batch, as float32 NumPy arrays.

        Args:
            image: (batch, band, y, x) in the images store's units.
            metadata: `Preprocessor.metadata` of the same samples; None if unknown.

        Raises:
            UserError: the network returns other shapes than its spec says.
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
        autocast_dtype = PRECISIONS[self.precision]
        with (
            torch.inference_mode(),
            torch.autocast(torch.device(self.device).type, dtype=autocast_dtype, enabled=autocast_dtype is not None),
        ):
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
                    key="strides" if stride else "layers",
                    value=shape,
                )
