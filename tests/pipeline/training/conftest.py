"""Small features that heads learn from."""

import pytest
import torch


@pytest.fixture
def points():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 12, generator=generator)
    label = (inputs @ torch.randn(12, 3, generator=generator)).argmax(1)
    return inputs, label


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(20, 4, side, side, generator=generator) for side in (16, 8, 4, 2)]
    label = (levels[0][:, 0] > 0).long().repeat_interleave(2, 1).repeat_interleave(2, 2)
    label[:, :6] = 255
    return levels, label
