import pytest
import torch

from pipeline.heads.config import HeadConfig
from pipeline.heads.linear import StackedLinear


def last_layer(group, head, inputs):
    return torch.nn.functional.linear(inputs, group.weights[-1][head], group.biases[-1][head])


@pytest.mark.parametrize("n_samples", [4, 40])
@pytest.mark.parametrize("index", [torch.tensor([[0, 3, 2], [2, 2, 1]]), None], ids=["own rows", "shared rows"])
def test_stacked_linear_is_k_linear_layers_in_values_and_gradients(n_samples, index):
    group, inputs = StackedLinear([6], 3, seeds=(0, 1)), torch.randn(n_samples, 6)
    ((heads, logits),) = group.forward_heads(inputs, index)
    assert heads == slice(None)
    rows = [inputs if index is None else inputs[index[head]] for head in (0, 1)]
    expected = torch.stack([last_layer(group, head, rows[head]) for head in (0, 1)])
    torch.testing.assert_close(logits, expected)
    grad_logits = torch.randn(logits.shape)
    for actual_grad, expected_grad in zip(
        torch.autograd.grad(logits, list(group.parameters()), grad_logits),
        torch.autograd.grad(expected, list(group.parameters()), grad_logits),
        strict=True,
    ):
        torch.testing.assert_close(actual_grad, expected_grad)
    assert not torch.equal(group.weights[0][0], group.weights[0][1])


def test_stacked_linear_of_a_seed_starts_as_torchs_linear():
    group = StackedLinear([6], 3, seeds=(4, 5))
    torch.manual_seed(5)
    assert torch.equal(group.weights[0][1], torch.nn.Linear(6, 3).weight)


@pytest.mark.parametrize("method", ["average", "film", "dot"])
def test_stacked_linear_with_fusion_is_the_formula(method):
    inputs, index, widths = torch.randn(9, 7), torch.tensor([[0, 3, 5], [8, 8, 1]]), [4, 3]
    group = HeadConfig("linear", method, (((4,),), ((3,),)), 2).create_group((0, 1))
    ((_, logits),) = group.forward_heads(inputs, index)
    for head in (0, 1):
        first, second = inputs[index[head]].split(widths, 1)
        projected = torch.nn.functional.linear(second, group.weights[0][head], group.biases[0][head])
        fused = {
            "average": lambda x, z: (x + z) / 2,
            "film": lambda x, z: x * (1 + z[:, :4]) + z[:, 4:],
            "dot": lambda x, z: x * z,
        }[method](first, projected)
        torch.testing.assert_close(logits[head], last_layer(group, head, fused))
