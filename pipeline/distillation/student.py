"""A student: a compact network of timm from chips, as the images store has them, to logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import timm
import torch
from torch import nn
from torch.nn import functional
from torchvision.ops import FeaturePyramidNetwork

from pipeline.errors import UserError

# Channels of the decoder of masks.
WIDTH = 32
# Levels that a student has, the deepest ones of its network.
LEVELS = 4


@dataclass(frozen=True)
class StudentSpec:
    """What decides a student's tensors.

    Attributes:
        architecture: timm's name of the network.
        bands: how many the chips have.
        classes: how many.
        task: classification, multilabel or segmentation.
        input_size: side in pixels to which chips are resized inside.
    """

    architecture: str
    n_bands: int
    n_classes: int
    task: str
    input_size: int


class Student(nn.Module):
    """Chips, float32 (batch, band, y, x) in the images store's own units and band order, to logits.

    Normalisation by the training split's mean and standard deviation of each band, and the resize to the network's
    input (bilinear; antialiased when shrinking), are inside, so an exported graph takes raw chips. Logits are float32
    (batch, class), from the means of every level, or, for segmentation, (batch, class, y, x) of the chips' own size,
    by a feature pyramid (Lin et al., CVPR 2017, arXiv 1612.03144).

    Args:
        mean, std: per band, in the chips' units.

    Raises:
        UserError: a network that timm does not have, that gives no maps, or whose stride the input is too small for.
    """

    def __init__(self, spec: StudentSpec, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.shape, self.dense = spec, spec.task == "segmentation"
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))
        self.network = _network(spec)
        self.channels = list(self.network.feature_info.channels())
        self.strides = list(self.network.feature_info.reduction())
        if self.dense:
            self.pyramid = FeaturePyramidNetwork(self.channels, WIDTH)
            self.head = nn.Conv2d(WIDTH, spec.n_classes, 1)
        else:
            self.head = nn.Linear(sum(self.channels), spec.n_classes)

    def forward(self, chips: torch.Tensor) -> torch.Tensor:
        return self.logits(self.levels(chips), chips.shape[-2:])

    def levels(self, chips: torch.Tensor) -> list[torch.Tensor]:
        """The network's maps of the chips, (batch, channel, y, x), finest first."""
        values, side = (chips - self.mean) / self.std, self.shape.input_size
        if chips.shape[-2:] != (side, side):
            shrinks = side < min(chips.shape[-2:])
            values = functional.interpolate(values, size=(side, side), mode="bilinear", antialias=shrinks)
        return self.network(values)

    def logits(self, levels: Sequence[torch.Tensor], size: Sequence[int]) -> torch.Tensor:
        """What the head says of the maps; of masks, brought to `size` [y, x]."""
        if not self.dense:
            return self.head(torch.cat([level.mean(dim=(2, 3)) for level in levels], dim=1))
        finest = self.pyramid({str(place): level for place, level in enumerate(levels)})["0"]
        # Of few channels, channels last is slow to resize, and all that follows.
        return functional.interpolate(self.head(finest).contiguous(), size=tuple(size), mode="bilinear")


def _network(shape: StudentSpec) -> nn.Module:
    """The network without a classifier, its tensors drawn by torch's generator as it stands.

    Raises:
        UserError: timm has no such network, it has no maps, or its input is too small.
    """
    if not timm.is_model(shape.architecture):
        raise UserError(f"timm has no network '{shape.architecture}'. `timm.list_models()` lists those it has.")
    failed = f"timm's '{shape.architecture}' cannot be a student of {shape.input_size} px and {shape.n_bands} bands"
    try:
        network = timm.create_model(
            shape.architecture, features_only=True, in_chans=shape.n_bands, out_indices=tuple(range(-LEVELS, 0))
        )
        strides, channels = network.feature_info.reduction(), network.feature_info.channels()
        if shape.input_size < max(strides):
            raise UserError(f"{failed}: its deepest level has stride {max(strides)}. Set a larger input_size.")
        with torch.no_grad():
            maps = network.eval()(torch.zeros(1, shape.n_bands, shape.input_size, shape.input_size))
    except (RuntimeError, AssertionError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{failed}: {' '.join(str(error).split())[:160]}. Choose another network.") from None
    if [level.ndim for level in maps] != [4] * LEVELS or [level.shape[1] for level in maps] != channels:
        raise UserError(f"{failed}: its outputs are not maps (channel, y, x). Choose another network.")
    return network.train()
