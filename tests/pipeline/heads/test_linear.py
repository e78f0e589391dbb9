import torch

from pipeline.heads.linear import LinearGroup


def test_one_product_is_k_linear_layers():
    group, inputs = LinearGroup(6, 3, seeds=(0, 1)), torch.randn(9, 6)
    index = torch.tensor([[0, 3, 5], [8, 8, 1]])
    ((heads, logits),) = group.pieces(inputs, index)
    assert heads == slice(None)
    for k in (0, 1):
        torch.testing.assert_close(logits[k], group.heads[k](inputs[index[k]]))
    assert not torch.equal(group.heads[0].weight, group.heads[1].weight)
