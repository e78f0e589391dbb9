"""FCN (Long et al., CVPR 2015): the linear probe of segmentation."""

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.feature_ops import resize


class Fcn(nn.Module):
    """Classify the cells of every level by a 1x1 convolution, and sum the logits on the finest grid.

    The same as one 1x1 convolution on all levels, resized and concatenated, but needs less memory.
    """

    def __init__(self, channels_in: Sequence[int], n_classes: int):
        super().__init__()
        self.scores = nn.ModuleList(nn.Conv2d(channels, n_classes, 1) for channels in channels_in)

    def forward(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        total, *coarser = (score(level) for score, level in zip(self.scores, levels, strict=True))
        for logits in coarser:
            total = total + resize(logits, total.shape[-2:])
        return total
