"""UPerNet (Xiao et al., ECCV 2018) on fused pyramids.

The same network as terratorch 1.2's `UperNetDecoder` with a 1x1 classifier, and the same parameter names, so
that its weights load here and give the same output (a test compares); written out because importing
terratorch takes 6 to 10 s in every training stage.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional

from pipeline.grids import resize

POOL_SCALES = (1, 2, 3, 6)


def _convolution(inputs: int, outputs: int, size: int) -> nn.Sequential:
    layers = {
        "conv": nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False),
        "norm": nn.BatchNorm2d(outputs),
        "act": nn.ReLU(),
    }
    block = nn.Sequential()
    for name, layer in layers.items():
        block.add_module(name, layer)
    return block


class _Averages(nn.Module):
    """`nn.AdaptiveAvgPool2d(scale)`; on a GPU as two products, whose gradient is the same each time.

    On a processor the products take five times as long.
    """

    def __init__(self, scale: int):
        super().__init__()
        self.scale = scale

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        if not maps.is_cuda:
            return functional.adaptive_avg_pool2d(maps, self.scale)
        rows, columns = (_shares(side, self.scale, maps.device) for side in maps.shape[-2:])
        with torch.autocast(maps.device.type, enabled=False):
            return (rows @ (maps.float() @ columns.t())).to(maps.dtype)


@lru_cache
@torch.inference_mode(False)  # or a tensor first made while predicting could not be trained through
def _shares(side: int, scale: int, device: torch.device) -> torch.Tensor:
    """What each of `side` cells gives to each of `scale` averages, float32 (scale, side)."""
    weights = torch.zeros(scale, side)
    for place in range(scale):
        first, last = place * side // scale, -(-(place + 1) * side // scale)
        weights[place, first:last] = 1 / (last - first)
    return weights.to(device)


class UPerNetDecoder(nn.Module):
    """Pyramid pooling on the deepest level, lateral and top-down convolutions, one fused map.

    Args:
        channels_in: channels of every level, finest first.
        channels: of the output map, at the finest level's size.
    """

    def __init__(self, channels_in: Sequence[int], channels: int):
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(_Averages(scale), _convolution(channels_in[-1], channels, 1)) for scale in POOL_SCALES
        )
        self.bottleneck = _convolution(channels_in[-1] + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(_convolution(width, channels, 1) for width in channels_in[:-1])
        self.fpn_convs = nn.ModuleList(_convolution(channels, channels, 3) for _ in channels_in[:-1])
        self.fpn_bottleneck = _convolution(len(channels_in) * channels, channels, 3)

    def forward(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Levels (batch, channel, y, x), finest first, to one map (batch, channels, y, x) of the finest size."""
        deepest = levels[-1]
        contexts = [resize(module(deepest), deepest.shape[-2:], align_corners=True) for module in self.psp_modules]
        maps = [lateral(level) for lateral, level in zip(self.lateral_convs, levels[:-1], strict=True)]
        maps.append(self.bottleneck(torch.cat([deepest, *contexts], dim=1)))
        for index in range(len(maps) - 1, 0, -1):
            maps[index - 1] = maps[index - 1] + resize(maps[index], maps[index - 1].shape[-2:], align_corners=True)
        smoothed = [conv(level) for conv, level in zip(self.fpn_convs, maps[:-1], strict=True)] + maps[-1:]
        finest = smoothed[0].shape[-2:]
        joined = torch.cat([smoothed[0], *[resize(level, finest, align_corners=True) for level in smoothed[1:]]], dim=1)
        return self.fpn_bottleneck(joined)


class UPerNet(nn.Module):
    """The decoder with a 1x1 classifier; logits (batch, class, y, x) at the finest level's size."""

    def __init__(self, channels_in: Sequence[int], channels: int, classes: int):
        super().__init__()
        self.decoder = UPerNetDecoder(channels_in, channels)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.classifier(self.decoder(levels))
