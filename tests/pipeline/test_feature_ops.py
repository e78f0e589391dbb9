"""Bilinear resizing as matrix products against torch's, and standardization."""

import pytest
import torch
from torch.nn import functional

from pipeline.feature_ops import bilinear_weights, resize, standardize_


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("old", "new"), [(4, 9), (9, 4), (1, 5), (3, 1)])
def test_bilinear_weights_give_torchs_interpolate(old, new, align_corners):
    maps = torch.randn(2, 3, old, old)
    weights = bilinear_weights(old, new, maps.device, align_corners)
    expected = functional.interpolate(maps, size=(new, new), mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(weights @ (maps @ weights.t()), expected)


def test_bilinear_weights_first_computed_in_inference_can_be_trained_through():
    with torch.inference_mode():
        weights = bilinear_weights(5, 13, torch.device("cpu"))
    maps = torch.randn(2, 3, 5, 5, requires_grad=True)
    (weights @ maps).sum().backward()
    assert maps.grad is not None


def test_resize_on_a_gpu_has_the_cpus_values_and_gradient(gpu):
    maps = torch.randn(2, 3, 5, 6, requires_grad=True)
    gpu_maps = maps.detach().to(gpu).requires_grad_()
    for values in (maps, gpu_maps):
        resize(values, (11, 7), align_corners=True).square().sum().backward()
    torch.testing.assert_close(gpu_maps.grad.cpu(), maps.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 5)])
def test_standardize_scales_every_channel_in_place(shape):
    values, mean, scale = torch.randn(shape), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 10.0])
    expected = torch.stack([(values[:, i] - mean[i]) * scale[i] for i in range(3)], dim=1)
    assert standardize_(values, mean, scale) is values
    torch.testing.assert_close(values, expected)
