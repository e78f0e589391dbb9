"""Prithvi's patch embedding as a matrix product is torch's Conv3d."""

import copy

import pytest
import torch

from pipeline.backbones.prithvi import patches


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 1, 28, 28), (1, 3, 1, 31, 45)])
@pytest.mark.parametrize("kernel", [(1, 14, 14), (1, 16, 8)])
def test_it_is_the_convolution(shape, kernel, bias):
    conv = torch.nn.Conv3d(3, 5, kernel, stride=kernel, bias=bias)
    image = torch.randn(shape).to(memory_format=torch.channels_last_3d)
    theirs = conv(image)
    conv.__class__ = patches()
    assert torch.equal(conv(image), theirs)  # a processor convolves
    torch.testing.assert_close(conv.product(image), theirs)


def test_several_times_at_once():
    conv = torch.nn.Conv3d(2, 4, (2, 3, 3), stride=(2, 3, 3))
    image = torch.randn(1, 2, 5, 6, 9)
    theirs = conv(image)
    conv.__class__ = patches()
    torch.testing.assert_close(conv.product(image), theirs)


def test_a_copy_has_its_own_weights():
    conv = torch.nn.Conv3d(2, 4, (1, 3, 3), stride=(1, 3, 3))
    conv.__class__ = patches()
    other = copy.deepcopy(conv)
    torch.nn.init.zeros_(other.weight)
    assert conv.product(torch.ones(1, 2, 1, 3, 3)).std() > 0
    assert list(other.state_dict()) == ["weight", "bias"]
