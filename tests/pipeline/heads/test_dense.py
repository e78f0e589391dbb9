import torch

from pipeline.heads.dense import HeadList
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
