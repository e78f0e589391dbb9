"""Principal axes of pooled vectors, in which linear heads are trained.

AdamW scales every weight by itself, which is slow where channels are correlated, as those of neighbouring bands and
of a backbone are. In the principal axes of the training split they are not. Each array is turned by itself, so that
the price grows with its width and not with the number of members. A rotation changes neither what a linear head can
say nor its sum of squared weights; a trained head is turned back, and reads features as they are stored. What is said
only by axes along which features hardly vary is lost (`FLAT`). Adam in an eigenbasis is from SOAP (Vyas et al. 2024,
arXiv 2409.11321), which finds the basis of the gradients instead.
"""

from collections.abc import Sequence

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from pipeline.heads.linear import StackedLinear
from pipeline.training.feature_inputs import STEP, Field, Statistics, standardised
from pipeline.training.feature_loader import StreamedFeatures

# Axes along which features vary less than this share of a channel's variance are left at zero: AdamW would make as
# much of what rounding to float16 left there as of any other.
FLAT = 1e-5


def principal(fields: Sequence[Field], by: Sequence[Statistics], training: np.ndarray) -> list[torch.Tensor]:
    """Principal axes of each array's standardised channels over the training rows, float32 (channel, axis).

    An axis that is `FLAT` is a column of zeros. One thread: last digits depend on how many there are.
    """
    with threadpool_limits(1):
        return [_axes(field, each, training) for field, each in zip(fields, by, strict=True)]


def _axes(field: Field, by: Statistics, training: np.ndarray) -> torch.Tensor:
    rows = (training[start : start + STEP] for start in range(0, len(training), STEP))
    values = (standardised(field, part, by).numpy().astype(np.float64) for part in rows)
    variance, found = np.linalg.eigh(sum(part.T @ part for part in values) / len(training))
    return torch.from_numpy(found * (variance > FLAT)).float()


def turned(inputs: torch.Tensor | StreamedFeatures, axes: Sequence[torch.Tensor]) -> torch.Tensor | StreamedFeatures:
    """Arrays side by side, (sample, channel), each in its axes."""
    if isinstance(inputs, StreamedFeatures):
        return inputs.turned(axes)
    each = inputs.split([len(one) for one in axes], dim=1)
    return torch.cat([part @ one for part, one in zip(each, axes, strict=True)], dim=1)


@torch.no_grad()
def turn_back(group: StackedLinear, axes: Sequence[torch.Tensor]) -> None:
    """Make heads that were trained on `turned` inputs say the same of the inputs themselves."""
    (weight,) = group.weights  # (head, class, channel)
    each = weight.split([len(one) for one in axes], dim=2)
    weight.copy_(torch.cat([part @ one.T for part, one in zip(each, axes, strict=True)], dim=2))
