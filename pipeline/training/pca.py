"""Train linear heads in the principal axes of pooled features.

AdamW scales every weight by itself, which converges slowly where channels are correlated, as those of a backbone are.
In the principal axes of the training split they are not. Each array is rotated by itself, so that the cost grows with
its width and not with the number of backbones. A rotation changes neither the functions that a linear head can
represent nor its sum of squared weights. A trained head is rotated back and reads features as they are stored; only
the axes of almost no variance are lost (`MIN_VARIANCE`).

Adam in an eigenbasis is from SOAP (Vyas et al. 2024, arXiv 2409.11321), which uses the basis of the gradients.
"""

from collections.abc import Sequence

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from pipeline.heads.linear import StackedLinear
from pipeline.training.feature_inputs import ROWS_PER_READ, ChannelStats, StoreArray, read_standardized
from pipeline.training.feature_loader import StreamedFeatures

# Axes of less variance (a standardized channel has 1) are set to zero: AdamW would amplify the rounding to float16
# that they consist of to the scale of the others.
MIN_VARIANCE = 1e-5


def principal_axes(
    arrays: Sequence[StoreArray], stats: Sequence[ChannelStats], train_rows: np.ndarray
) -> list[torch.Tensor]:
    """Compute the principal axes of each array's standardized channels over the training rows.

    BLAS has one thread, because floating-point rounding depends on the number of threads.

    Returns:
        A matrix per array, float32 (channel, axis); an axis of less than `MIN_VARIANCE` is a column of zeros.
    """
    with threadpool_limits(1):
        return [_axes(array, array_stats, train_rows) for array, array_stats in zip(arrays, stats, strict=True)]


def _axes(array: StoreArray, stats: ChannelStats, train_rows: np.ndarray) -> torch.Tensor:
    parts = (train_rows[start : start + ROWS_PER_READ] for start in range(0, len(train_rows), ROWS_PER_READ))
    values = (read_standardized(array, rows, stats).numpy().astype(np.float64) for rows in parts)
    variance, axes = np.linalg.eigh(sum(part.T @ part for part in values) / len(train_rows))
    return torch.from_numpy(axes * (variance > MIN_VARIANCE)).float()


def rotate(
    inputs: torch.Tensor | StreamedFeatures, rotations: Sequence[torch.Tensor]
) -> torch.Tensor | StreamedFeatures:
    """Rotate concatenated arrays (sample, channel), each by its matrix (channel, axis)."""
    if isinstance(inputs, StreamedFeatures):
        return inputs.rotate(rotations)
    parts = inputs.split([len(rotation) for rotation in rotations], dim=1)
    return torch.cat([part @ rotation for part, rotation in zip(parts, rotations, strict=True)], dim=1)


@torch.no_grad()
def rotate_back(group: StackedLinear, rotations: Sequence[torch.Tensor]) -> None:
    """Change heads trained on rotated inputs so that they give the same logits on the inputs themselves."""
    (weight,) = group.weights  # (head, class, channel)
    parts = weight.split([len(rotation) for rotation in rotations], dim=2)
    weight.copy_(torch.cat([part @ rotation.T for part, rotation in zip(parts, rotations, strict=True)], dim=2))
