"""Resizing as products: torch's own numbers, whichever way the grids are laid."""

import pytest
import torch
from torch.nn import functional

from pipeline.grids import bilinear_weights, resize


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize(("old", "new"), [(4, 9), (9, 4), (1, 5), (7, 7), (3, 1)])
def test_the_weights_are_those_of_torch(old, new, corners):
    maps = torch.randn(2, 3, old, old)
    weights = bilinear_weights(old, new, maps.device, corners)
    theirs = functional.interpolate(maps, size=(new, new), mode="bilinear", align_corners=corners)
    torch.testing.assert_close(weights @ (maps @ weights.t()), theirs)


def test_weights_first_made_while_predicting_can_be_trained_through():
    with torch.inference_mode():
        weights = bilinear_weights(5, 13, torch.device("cpu"))
    maps = torch.randn(2, 3, 5, 5, requires_grad=True)
    (weights @ maps).sum().backward()
    assert maps.grad is not None


def test_a_gpu_gives_the_same_and_the_same_gradient(gpu):
    maps = torch.randn(2, 3, 5, 6, requires_grad=True)
    there = maps.detach().to(gpu).requires_grad_()
    for one in (maps, there):
        resize(one, (11, 7), align_corners=True).square().sum().backward()
    torch.testing.assert_close(there.grad.cpu(), maps.grad, rtol=1e-4, atol=1e-4)
