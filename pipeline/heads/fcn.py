"""FCN (Long et al., CVPR 2015): the linear probe of segmentation."""

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.grids import resize


class Fcn(nn.Module):
    """Every level scored by a 1x1 convolution, the scores added up on the finest grid.

    Linear in the features: the same as one 1x1 convolution on all levels resized and concatenated, without
    resizing more than the classes.

    Args:
        channels_in: channels of every level, finest first.
        classes: outputs.
    """

    def __init__(self, channels_in: Sequence[int], classes: int):
        super().__init__()
        self.scores = nn.ModuleList(nn.Conv2d(channels, classes, 1) for channels in channels_in)

    def forward(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Levels (batch, channel, y, x), finest first, to logits (batch, class, y, x) of the finest size."""
        finest, *others = (score(level) for score, level in zip(self.scores, levels, strict=True))
        for other in others:
            finest = finest + resize(other, finest.shape[-2:])
        return finest
