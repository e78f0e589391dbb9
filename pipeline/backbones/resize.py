"""Bilinear resizing on a processor, antialiased when shrinking, several times faster than torch's of float images.

Each new row or column is a weighted sum of a few neighbours. Rows are summed as rows; columns by matrix products of
neighbouring ones, which are small because far ones have no part in one another.
"""

from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional

# New columns in one product.
_COLUMNS = 32


def bilinear(values: torch.Tensor, side: int) -> torch.Tensor:
    """Images (sample, band, y, x), float32 and contiguous, at side x side.

    The same as torch's `interpolate` with `antialias`, whose weights are rounded to float32 earlier.
    """
    if values.shape[2] > side:  # whichever leaves less for the other
        return _columns(_rows(values, side), side)
    return _rows(_columns(values, side), side)


def _rows(values: torch.Tensor, side: int) -> torch.Tensor:
    """(sample, band, y, x) as (sample, band, side, x)."""
    *shape, height, width = values.shape
    place, first, weight = _neighbours(height, side)
    image = torch.arange(shape[0] * shape[1])[:, None]
    summed = functional.embedding_bag(
        (place + height * image).flatten(),
        values.reshape(-1, width),
        (first + len(place) * image).flatten(),
        mode="sum",
        per_sample_weights=weight.repeat(len(image)),
    )
    return summed.view(*shape, side, width)


def _columns(values: torch.Tensor, side: int) -> torch.Tensor:
    """(sample, band, y, x) as (sample, band, y, side)."""
    lines = values.reshape(-1, values.shape[-1])
    resized = values.new_empty(len(lines), side)
    for new, old, weight in _products(values.shape[-1], side):
        torch.mm(lines[:, old], weight, out=resized[:, new])
    return resized.view(*values.shape[:-1], side)


@lru_cache
def _neighbours(old: int, new: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which old rows make the new ones: their numbers, where each new row's begin among them, and weights."""
    weights = _weights(old, new)
    row, place = np.nonzero(weights)
    first = np.searchsorted(row, np.arange(new))
    return torch.from_numpy(place), torch.from_numpy(first), torch.from_numpy(weights[row, place].astype(np.float32))


@lru_cache
def _products(old: int, new: int) -> list[tuple[slice, slice, torch.Tensor]]:
    """New columns, the old ones that make them, and weights float32 (old, new), a few new columns at a time."""
    weights, products = _weights(old, new), []
    for start in range(0, new, _COLUMNS):
        some = weights[start : start + _COLUMNS]
        used = np.flatnonzero(some.any(axis=0))
        taken = slice(used[0], used[-1] + 1)
        weight = np.ascontiguousarray(some[:, taken].T, dtype=np.float32)
        products.append((slice(start, start + len(some)), taken, torch.from_numpy(weight)))
    return products


def _weights(old: int, new: int) -> np.ndarray:
    """Weights of old rows in new ones, float64 (new, old), each a triangle about the new row's centre.

    It is as wide as two old rows or two new ones, whichever is more.
    """
    centre = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(old) - centre) / max(1, old / new))
    return weights / weights.sum(axis=1, keepdims=True)
