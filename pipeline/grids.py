"""Maps brought from one grid to another, bilinearly."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch.nn import functional


def resize(maps: torch.Tensor, size: Sequence[int], align_corners: bool = False) -> torch.Tensor:
    """Maps (batch, channel, y, x) at another height and width.

    By torch's `interpolate`; on a GPU by two matrix products, since there torch adds its gradient up in another order
    each time, or in many small steps.

    Args:
        corners: the grids' corners are the same point; otherwise the edges of their cells are.
    """
    if not maps.is_cuda:
        return functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=align_corners)
    rows, columns = (bilinear_weights(old, new, maps.device, align_corners) for old, new in zip(maps.shape[-2:], size, strict=True))
    with torch.autocast(maps.device.type, enabled=False):  # bfloat16 weights would not add up to one
        return (rows @ (maps.float() @ columns.t())).to(maps.dtype)


@lru_cache
@torch.inference_mode(False)  # or a tensor first made while predicting could not be trained through
def bilinear_weights(old: int, new: int, device: torch.device, align_corners: bool = False) -> torch.Tensor:
    """Weights of old rows in new ones, float32 (new, old); `corners` as for `resized`."""
    place = torch.arange(new, dtype=torch.float64)
    place = place * (old - 1) / max(1, new - 1) if align_corners else ((place + 0.5) * old / new - 0.5).clamp(0, old - 1)
    weights = (1 - (place[:, None] - torch.arange(old)).abs()).clamp_min(0)
    return weights.float().to(device)
