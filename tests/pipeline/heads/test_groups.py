"""Groups of heads and their networks, against those of torch and terratorch."""

import pytest
import torch
from terratorch.models.decoders.upernet_decoder import UperNetDecoder
from terratorch.models.necks import LearnedInterpolateToPyramidal
from torch.nn import functional

from pipeline.heads.config import HeadConfig
from pipeline.heads.dense import HeadList
from pipeline.heads.fcn import Fcn
from pipeline.heads.fusion import LearnedPyramid, get_fusion
from pipeline.heads.linear import StackedLinear
from pipeline.heads.upernet import UPerNet, UPerNetDecoder, _pool_weights

WIDTHS = [12, 20, 28, 36]


def apply_layer(group, layer, head, inputs):
    return functional.linear(inputs, group.weights[layer][head], group.biases[layer][head])


@pytest.mark.parametrize("n_samples", [4, 40])
@pytest.mark.parametrize("index", [torch.tensor([[0, 3, 2], [2, 2, 1]]), None], ids=["own rows", "shared rows"])
def test_stacked_linear_is_k_linear_layers_in_values_and_gradients(n_samples, index):
    group, inputs = StackedLinear([6], 3, seeds=(0, 1)), torch.randn(n_samples, 6)
    ((heads, logits),) = group.forward_heads(inputs, index)
    assert heads == slice(None)
    rows = [inputs if index is None else inputs[index[head]] for head in (0, 1)]
    expected = torch.stack([apply_layer(group, -1, head, rows[head]) for head in (0, 1)])
    torch.testing.assert_close(logits, expected)
    grad_logits = torch.randn(logits.shape)
    gradients = [torch.autograd.grad(values, list(group.parameters()), grad_logits) for values in (logits, expected)]
    torch.testing.assert_close(*gradients)
    assert not torch.equal(group.weights[0][0], group.weights[0][1])


@pytest.mark.parametrize("method", ["average", "film", "dot"])
def test_stacked_linear_fuses_the_first_backbone_and_the_projected_second(method):
    inputs, index = torch.randn(9, 7), torch.tensor([[0, 3, 5], [8, 8, 1]])
    group = HeadConfig("linear", method, (((4,),), ((3,),)), 2).create_group((0, 1))
    ((_, logits),) = group.forward_heads(inputs, index)
    for head in (0, 1):
        first, second = inputs[index[head]].split([4, 3], 1)
        fused = get_fusion(method).fuse(first, [apply_layer(group, 0, head, second)], dim=1)
        torch.testing.assert_close(logits[head], apply_layer(group, 1, head, fused))


def test_head_list_logits_have_the_masks_size_and_depend_on_the_seed():
    group = HeadList(lambda: UPerNet([4, 6, 8, 10], 3, 8), (50, 60), seeds=(0, 1, 0))
    levels = [torch.randn(5, width, side, side) for width, side in zip((4, 6, 8, 10), (16, 8, 4, 2), strict=True)]
    index = torch.arange(4).expand(3, -1)
    logits = [head_logits for _, head_logits in group.forward_heads(levels, index)]
    assert [tuple(head_logits.shape) for head_logits in logits] == [(1, 4, 3, 50, 60)] * 3
    assert torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], logits[1])
    low_res = group.heads[1]([level[:4] for level in levels])
    expected = functional.interpolate(low_res, (50, 60), mode="bilinear")
    torch.testing.assert_close(logits[1][0], expected, rtol=1e-5, atol=1e-5)


def test_fcn_is_one_linear_layer_on_all_resized_levels():
    levels = [torch.randn(2, width, side, side) for width, side in ((3, 8), (5, 4), (2, 2))]
    fcn = Fcn([3, 5, 2], 4)
    resized = [functional.interpolate(level, size=(8, 8), mode="bilinear") for level in levels]
    weight = torch.cat([score.weight for score in fcn.scores], dim=1)
    bias = sum(score.bias for score in fcn.scores)
    expected = functional.conv2d(torch.cat(resized, dim=1), weight, bias)
    torch.testing.assert_close(fcn(levels), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("reference", "network", "sides"),
    [
        (UperNetDecoder(WIDTHS, channels=16, align_corners=True), UPerNetDecoder(WIDTHS, 16), (32, 16, 8, 4)),
        (LearnedInterpolateToPyramidal(WIDTHS), LearnedPyramid(WIDTHS), (14, 14, 14, 14)),
    ],
    ids=["decoder", "pyramid"],
)
def test_network_with_terratorchs_weights_has_its_output(reference, network, sides):
    network.load_state_dict(reference.state_dict(), strict=True)
    levels = [torch.randn(2, width, side, side) for width, side in zip(WIDTHS, sides, strict=True)]
    for mode in (True, False):  # with batch statistics, then with running ones
        expected = reference.train(mode)(list(levels))
        torch.testing.assert_close(network.train(mode)(levels), expected, rtol=1e-5, atol=1e-5)
    if isinstance(network, LearnedPyramid):
        assert [tuple(level.shape[1:]) for level in expected] == network.shapes(14, 14)


@pytest.mark.parametrize(("side", "scale"), [(4, 1), (4, 3), (4, 6), (7, 6), (14, 6)])
def test_pool_weights_give_torchs_adaptive_average_pool(side, scale):
    maps, weights = torch.randn(2, 3, side, side), _pool_weights(side, scale, torch.device("cpu"))
    expected = torch.nn.functional.adaptive_avg_pool2d(maps, scale)
    torch.testing.assert_close(weights @ maps @ weights.t(), expected)
