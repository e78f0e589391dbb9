import torch

from pipeline.heads.dense import HeadList
from pipeline.heads.fcn import Fcn
from pipeline.heads.upernet import UPerNet


def test_head_list_logits_have_the_masks_size_and_depend_on_the_seed():
    group = HeadList(lambda: UPerNet([4, 6, 8, 10], 3, 8), (50, 60), seeds=(0, 1, 0))
    levels = [torch.randn(5, width, side, side) for width, side in zip((4, 6, 8, 10), (16, 8, 4, 2), strict=True)]
    index = torch.arange(4).expand(3, -1)
    logits = [head_logits for _, head_logits in group.forward_heads(levels, index)]
    assert [tuple(head_logits.shape) for head_logits in logits] == [(1, 4, 3, 50, 60)] * 3
    assert torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], logits[1])
    low_res = group.heads[1]([level[:4] for level in levels])
    expected = torch.nn.functional.interpolate(low_res, (50, 60), mode="bilinear")
    torch.testing.assert_close(logits[1][0], expected, rtol=1e-5, atol=1e-5)


def test_fcn_is_one_linear_layer_on_all_resized_levels():
    levels = [torch.randn(2, width, side, side) for width, side in ((3, 8), (5, 4), (2, 2))]
    fcn = Fcn([3, 5, 2], 4)
    resized = [torch.nn.functional.interpolate(level, size=(8, 8), mode="bilinear") for level in levels]
    weight = torch.cat([score.weight for score in fcn.scores], dim=1)
    bias = sum(score.bias for score in fcn.scores)
    expected = torch.nn.functional.conv2d(torch.cat(resized, dim=1), weight, bias)
    torch.testing.assert_close(fcn(levels), expected, atol=1e-5, rtol=1e-5)
