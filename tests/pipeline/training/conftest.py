"""Small features with a rule that heads can learn."""

import pytest
import torch

from pipeline.tasks import IGNORE


@pytest.fixture
def points():
    """Inputs (300, 12) and labels (300,): the class of the highest of three random projections."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 12, generator=generator)
    label = (inputs @ torch.randn(12, 3, generator=generator)).argmax(1)
    return inputs, label


@pytest.fixture
def maps():
    """Four levels of 20 samples, and masks (20, 32, 32): the sign of the finest level's first channel."""
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(20, 4, side, side, generator=generator) for side in (16, 8, 4, 2)]
    label = (levels[0][:, 0] > 0).long().repeat_interleave(2, 1).repeat_interleave(2, 2)
    label[:, :6] = IGNORE
    return levels, label
