"""No network at all: the mean and standard deviation of each band, the baseline that any backbone must beat.

As a pyramid, each cell holds its own mean and standard deviation; pooled, the whole chip's. A chip larger than
`input_size` is thinned by nearest neighbour first, so give the chip's size to use every pixel.
"""

from pathlib import Path

from pipeline.backbones.base import BackboneSpec, FeaturePyramid, InputBands

LEARNS = False
VARIANTS = {
    "mean_std": BackboneSpec(
        bands=None,
        input_units="unit",
        mean=None,
        std=None,
        strides=(4, 8, 16, 32),
        layers=("cells of 4 px", "cells of 8 px", "cells of 16 px", "cells of 32 px"),
        # Nearest neighbour keeps the bands' own values, so that the spread is the chip's own.
        resize="nearest",
    )
}


def build(variant: str, weights: str, folder: Path, seed: int, seen: InputBands, declared: BackboneSpec):
    """A torch module (batch, band, y, x) → Pyramid with 2 x band channels; nothing is loaded."""
    import torch
    from torch.nn import functional

    strides = VARIANTS[variant].strides

    def statistics(image, size):
        mean = functional.avg_pool2d(image, size)
        spread = functional.avg_pool2d(image.square(), size) - mean.square()
        return torch.cat([mean, spread.clamp_min(0).sqrt()], dim=1)

    class CellStatistics(torch.nn.Module):
        def forward(self, image):
            levels = [statistics(image, stride) for stride in strides]
            return FeaturePyramid(levels, {"mean_std": statistics(image, image.shape[-2:]).flatten(1)})

    return CellStatistics()
