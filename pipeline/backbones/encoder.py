"""The one sealed way from stored images to features: select → `Inputs.tensor` → backbone → check.

Nothing else may call a backbone, so that no step can be forgotten or done twice.
"""

import copy
import os
from collections.abc import Mapping

import numpy as np
import torch
from torch.nn.utils import convert_conv2d_weight_memory_format

from pipeline.backbones.base import FeaturePyramid
from pipeline.backbones.preprocessing import Preprocessor
from pipeline.errors import UserError

# On a CPU torch takes fresh memory for every layer's output; in large pages that costs less
# (benchmarks/choices.py). torch reads this when it first makes a tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Encoder:
    """Encodes batches of one dataset's images with one frozen backbone.

    Args:
        inputs: what the backbone is given.
        network: its torch module.
        device: `cpu`, `cuda` or one of several, such as `cuda:1`.
        precision: of the forward: `float32`, or autocast to `bfloat16` or `float16`.
        compiled: by torch.compile.
        strides: input pixels per cell of each level, as declared; empty if they are not.
    """

    def __init__(self, preprocessor: Preprocessor, network, device: str, precision="float32", compiled=False, strides=()):
        self.device = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
        self.preprocessor, self.strides = preprocessor, strides
        self.precision = precision
        # Channels last is no slower on a CPU (benchmarks/choices.py), and what GPUs want in low precision.
        self.network = convert_conv2d_weight_memory_format(network.to(self.device), torch.channels_last)
        self._compiled = compiled
        self._forward = torch.compile(self.network) if compiled else self.network

    def clone_sharing_weights(self) -> "Encoder":
        """Another encoder of the same weights, for a forward beside this one's.

        Some networks keep things in themselves while they compute (timm's feature hooks do), which two forwards
        through one network would mix up without an error.
        """
        shared = {id(each): each for each in [*self.network.parameters(), *self.network.buffers()]}
        network = copy.deepcopy(self.network, shared)
        return Encoder(self.preprocessor, network, self.device, self.precision, self._compiled, self.strides)

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """The exact tensor that reaches the network: float32 (batch, band, input_size, input_size).

        Args:
            image: (batch, band, y, x) in the store's units.
        """
        return self.preprocessor.__call__(torch.from_numpy(self.preprocessor.select_bands(image)).to(self.device))

    def __call__(self, image: np.ndarray, metadata: Mapping[str, np.ndarray] | None = None) -> FeaturePyramid:
        """Features of a batch, as float32 numpy arrays.

        Args:
            image: (batch, band, y, x) in the store's units.
            context: `Inputs.where_and_when` of the same samples; without it nothing is known of them.

        Raises:
            UserError: the backbone gave other shapes than it declares.
        """
        given = {name: torch.from_numpy(values).to(self.device) for name, values in (metadata or {}).items()}
        pyramid = self.forward(self.prepare(image), given)
        return FeaturePyramid(
            [level.float().cpu().numpy() for level in pyramid.levels],
            {name: vector.float().cpu().numpy() for name, vector in pyramid.pooled.items()},
        )

    def forward(self, batch: torch.Tensor, metadata: Mapping[str, torch.Tensor]) -> FeaturePyramid:
        """Features of prepared inputs, tensors on the device."""
        # Importing terratorch 1.2 sets this to "medium" for the whole process, which makes float32
        # convolutions run in bfloat16 on CPUs that can, with errors of some percent.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False  # torch lets GPUs convolve float32 with ten bits of mantissa
        lower = PRECISIONS[self.precision]
        with (
            torch.inference_mode(),
            torch.autocast(torch.device(self.device).type, dtype=lower, enabled=lower is not None),
        ):
            pyramid = self._forward(batch, **metadata)
        self._check(pyramid)
        return pyramid

    def _check(self, pyramid: FeaturePyramid) -> None:
        side = self.preprocessor.input_bands.input_size
        for level, stride in zip(pyramid.levels, self.strides or [None] * len(pyramid.levels), strict=True):
            shape = tuple(level.shape)
            if len(shape) != 4 or shape[2] != shape[3] or (stride and shape[2] != side // stride):
                wanted = (
                    f"{side // stride}x{side // stride} cells were declared" if stride else "square maps are needed"
                )
                raise UserError(f"A level has shape {shape} for an input of {side} px; {wanted}.")
