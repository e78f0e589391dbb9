import torch

from pipeline.heads.fusion import fuse, projection_shapes
from pipeline.heads.linear import StackedLinear


def layer(group, head, inputs):
    return torch.nn.functional.linear(inputs, group.weights[-1][head], group.biases[-1][head])


def test_one_product_is_k_linear_layers():
    """By each head's own rows, by a product over all rows, and with rows that all share: values and gradients."""
    group = StackedLinear([6], 3, seeds=(0, 1))
    for count in (4, 40):
        inputs = torch.randn(count, 6)
        for index in (torch.tensor([[0, 3, 2], [2, 2, 1]]), None):
            ((heads, logits),) = group.forward_heads(inputs, index)
            assert heads == slice(None)
            rows = [inputs if index is None else inputs[index[k]] for k in (0, 1)]
            expected = torch.stack([layer(group, k, rows[k]) for k in (0, 1)])
            torch.testing.assert_close(logits, expected)
            pull = torch.randn(logits.shape)
            for ours, theirs in zip(
                torch.autograd.grad(logits, list(group.parameters()), pull),
                torch.autograd.grad(expected, list(group.parameters()), pull),
                strict=True,
            ):
                torch.testing.assert_close(ours, theirs)
    assert not torch.equal(group.weights[0][0], group.weights[0][1])


def test_a_seeds_start_is_torchs():
    group = StackedLinear([6], 3, seeds=(4, 5))
    torch.manual_seed(5)
    assert torch.equal(group.weights[0][1], torch.nn.Linear(6, 3).weight)


def test_members_averaged_modulated_and_multiplied():
    inputs = torch.randn(9, 7)
    index = torch.tensor([[0, 3, 5], [8, 8, 1]])
    for method in ("average", "film", "dot"):
        widths = [4, 3]
        group = StackedLinear(
            widths, 2, (0, 1), projection_shapes(method, widths), lambda x, y, m=method: fuse(m, x, y, dim=2)
        )
        ((_, logits),) = group.forward_heads(inputs, index)
        for head in (0, 1):
            x, y = inputs[index[head]].split(widths, 1)
            z = torch.nn.functional.linear(y, group.weights[0][head], group.biases[0][head])
            joined = {
                "average": lambda x=x, z=z: (x + z) / 2,
                "film": lambda x=x, z=z: x * (1 + z[:, :4]) + z[:, 4:],
                "dot": lambda x=x, z=z: x * z,
            }[method]()
            torch.testing.assert_close(logits[head], layer(group, head, joined))
