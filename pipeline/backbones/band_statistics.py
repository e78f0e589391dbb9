"""Band statistics: the mean and standard deviation of each band, a baseline without a network.

In the pyramid, each cell has its mean and standard deviation; the pooled vector has those of the chip. A chip
larger than `input_size` is resized by nearest neighbour first: set `input_size` to the chip's size to use
every pixel.
"""

from pathlib import Path

import torch
from torch.nn import functional

from pipeline.backbones.base import BackboneSpec, FeaturePyramid, InputBands
from pipeline.config import BackboneConfig


class CellStatistics(torch.nn.Module):
    """Mean and standard deviation of each band, over square cells of `strides` pixels and over the chip."""

    def __init__(self, strides: tuple[int, ...]):
        super().__init__()
        self.strides = strides

    def forward(self, image: torch.Tensor) -> FeaturePyramid:
        levels = [_mean_and_std(image, stride) for stride in self.strides]
        return FeaturePyramid(levels, {"mean_std": _mean_and_std(image, image.shape[-2:]).flatten(1)})


def create_network(
    backbone: BackboneConfig, spec: BackboneSpec, input_bands: InputBands, weights_dir: Path
) -> CellStatistics:
    return CellStatistics(spec.strides)


def _mean_and_std(image: torch.Tensor, cell: int | tuple[int, int]) -> torch.Tensor:
    """Return means, then standard deviations, (batch, 2 x band, y, x), over cells of the image."""
    mean = functional.avg_pool2d(image, cell)
    variance = functional.avg_pool2d(image.square(), cell) - mean.square()
    return torch.cat([mean, variance.clamp_min(0).sqrt()], dim=1)
