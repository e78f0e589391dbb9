"""Operations on feature tensors: bilinear resizing and standardization."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch.nn import functional


def resize(maps: torch.Tensor, size: Sequence[int], align_corners: bool = False) -> torch.Tensor:
    """Resize maps (batch, channel, y, x) bilinearly to a height and width, like `interpolate`.

    On a GPU by two matrix products, because the gradient of `interpolate` is not deterministic there, or slow.
    """
    if not maps.is_cuda:
        return functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=align_corners)
    rows, columns = (
        bilinear_weights(old, new, maps.device, align_corners) for old, new in zip(maps.shape[-2:], size, strict=True)
    )
    with torch.autocast(maps.device.type, enabled=False):  # weights in bfloat16 would not sum to 1
        return (rows @ (maps.float() @ columns.t())).to(maps.dtype)


@lru_cache
@torch.inference_mode(False)  # else autograd could not use weights that are first computed in inference
def bilinear_weights(old: int, new: int, device: torch.device, align_corners: bool = False) -> torch.Tensor:
    """Return the weights of `old` rows in `new` resized rows, float32 (new, old)."""
    position = torch.arange(new, dtype=torch.float64)
    if align_corners:
        position = position * (old - 1) / max(1, new - 1)
    else:
        position = ((position + 0.5) * old / new - 0.5).clamp(0, old - 1)
    weights = (1 - (position[:, None] - torch.arange(old)).abs()).clamp_min(0)
    return weights.float().to(device)


def standardize_(values: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Subtract the mean and multiply by the scale (channel,) of values (sample, channel, …), in place."""
    shape = (-1, *[1] * (values.ndim - 2))
    return values.sub_(mean.view(shape)).mul_(scale.view(shape))


def channels_last(maps: torch.Tensor) -> torch.Tensor:
    """Return maps (batch, channel, y, x) in the memory format that convolutions are fastest in on a CPU."""
    return maps.contiguous(memory_format=torch.channels_last)
