"""A vision transformer's levels, all of one grid, as a pyramid.

The same network as terratorch 1.2's `LearnedInterpolateToPyramidal`, and the same parameter names, so that its
weights load here and give the same output (a test compares).
"""

from collections.abc import Sequence

import torch
from torch import nn

LEVELS = 4


class LearnedPyramid(nn.Module):
    """Four levels of one grid (y, x) become grids of 4, 2, 1 and 1/2 times its sides.

    Args:
        channels: of the four levels.

    Attributes:
        channels: of the four levels it gives.
    """

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        first, second, third, fourth = channels
        self.channels = [first // 4, second // 2, third, fourth]
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(first, first // 2, 2, 2),
            nn.BatchNorm2d(first // 2),
            nn.GELU(),
            nn.ConvTranspose2d(first // 2, first // 4, 2, 2),
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(second, second // 2, 2, 2))
        self.fpn3 = nn.Sequential(nn.Identity())
        self.fpn4 = nn.Sequential(nn.MaxPool2d(2, 2))

    def forward(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Levels (batch, channel, y, x) of one grid to a pyramid, finest first."""
        scaled = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [module(level) for module, level in zip(scaled, levels, strict=True)]
