"""UPerNet (Xiao et al., ECCV 2018) on fused pyramids.

The same network and parameter names as terratorch 1.2's `UperNetDecoder` with a 1x1 classifier; a test compares the
outputs. It is a copy because terratorch takes 6 to 10 s to import.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional

from pipeline.feature_ops import resize

POOL_SCALES = (1, 2, 3, 6)


def _conv_norm_relu(channels_in: int, channels_out: int, kernel_size: int) -> nn.Sequential:
    block = nn.Sequential()
    block.add_module("conv", nn.Conv2d(channels_in, channels_out, kernel_size, padding=kernel_size // 2, bias=False))
    block.add_module("norm", nn.BatchNorm2d(channels_out))
    block.add_module("act", nn.ReLU())
    return block


class _AveragePool(nn.Module):
    """`nn.AdaptiveAvgPool2d(scale)`; on a GPU as two matrix products, whose gradient is deterministic."""

    def __init__(self, scale: int):
        super().__init__()
        self.scale = scale

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        if not maps.is_cuda:
            return functional.adaptive_avg_pool2d(maps, self.scale)
        rows, columns = (_pool_weights(side, self.scale, maps.device) for side in maps.shape[-2:])
        with torch.autocast(maps.device.type, enabled=False):  # weights in bfloat16 would not sum to 1
            return (rows @ (maps.float() @ columns.t())).to(maps.dtype)


@lru_cache
@torch.inference_mode(False)  # else autograd could not use weights that are first computed in inference
def _pool_weights(side: int, scale: int, device: torch.device) -> torch.Tensor:
    """Weights of `side` cells in each of `scale` averages, float32 (scale, side)."""
    weights = torch.zeros(scale, side)
    for index in range(scale):
        first, last = index * side // scale, -(-(index + 1) * side // scale)
        weights[index, first:last] = 1 / (last - first)
    return weights.to(device)


class UPerNetDecoder(nn.Module):
    """Pool the deepest level at several scales and merge the levels top-down to one map."""

    def __init__(self, channels_in: Sequence[int], channels: int):
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(_AveragePool(scale), _conv_norm_relu(channels_in[-1], channels, 1)) for scale in POOL_SCALES
        )
        self.bottleneck = _conv_norm_relu(channels_in[-1] + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(_conv_norm_relu(width, channels, 1) for width in channels_in[:-1])
        self.fpn_convs = nn.ModuleList(_conv_norm_relu(channels, channels, 3) for _ in channels_in[:-1])
        self.fpn_bottleneck = _conv_norm_relu(len(channels_in) * channels, channels, 3)

    def forward(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        deepest = levels[-1]
        contexts = [resize(module(deepest), deepest.shape[-2:], align_corners=True) for module in self.psp_modules]
        maps = [lateral(level) for lateral, level in zip(self.lateral_convs, levels[:-1], strict=True)]
        maps.append(self.bottleneck(torch.cat([deepest, *contexts], dim=1)))
        for index in range(len(maps) - 1, 0, -1):
            maps[index - 1] = maps[index - 1] + resize(maps[index], maps[index - 1].shape[-2:], align_corners=True)
        smoothed = [conv(level) for conv, level in zip(self.fpn_convs, maps[:-1], strict=True)] + maps[-1:]
        finest = smoothed[0].shape[-2:]
        resized = [resize(level, finest, align_corners=True) for level in smoothed[1:]]
        return self.fpn_bottleneck(torch.cat([smoothed[0], *resized], dim=1))


class UPerNet(nn.Module):
    """The decoder, `channels` wide, with a 1x1 classifier; `channels_in` are of every level, finest first."""

    def __init__(self, channels_in: Sequence[int], n_classes: int, channels: int):
        super().__init__()
        self.decoder = UPerNetDecoder(channels_in, channels)
        self.classifier = nn.Conv2d(channels, n_classes, 1)

    def forward(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.classifier(self.decoder(levels))
