import pytest
import torch

from pipeline.heads.dense import HeadList
from pipeline.heads.upernet import UPerNet
from pipeline.tasks import IGNORE, Segmentation


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


@pytest.mark.parametrize("size", [(24, 40), (8, 8), (5, 3)], ids=["finer masks", "the same grid", "coarser masks"])
@pytest.mark.parametrize("class_weights", [None, (0.2, 1.0, 4.0, 0.0)], ids=["equal weights", "class weights"])
@pytest.mark.parametrize("has_ignored", [False, True], ids=["all pixels", "some ignored"])
def test_backward_of_head_list_is_autograds_through_torchs_resize(size, class_weights, has_ignored):
    """Two heads, each with its own rows; one mask is ignored as a whole."""
    task, generator = Segmentation(4, class_weights), torch.Generator().manual_seed(0)
    levels = [torch.randn(6, 5, side, side, generator=generator) for side in (8, 4, 2)]
    label = torch.randint(4, (2, 3, *size), generator=generator).to(torch.uint8)
    if has_ignored:
        label[:, 0], label[:, 1, :2] = IGNORE, IGNORE
    group, index = HeadList(lambda: UPerNet([5, 5, 5], 4, 6), size, (0, 1)), torch.tensor([[0, 1, 2], [5, 3, 2]])
    expected = []
    for head, rows, head_label in zip(group.heads, index, label, strict=True):
        low_res = head([level[rows] for level in levels])
        logits = torch.nn.functional.interpolate(low_res, size, mode="bilinear")
        loss = task.loss(logits[None], head_label[None]).sum()
        expected += torch.autograd.grad(loss, list(head.parameters()))
    group.backward(levels, index, lambda logits, heads: task.loss_grad(logits, label[heads]))
    for parameter, grad in zip(group.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)
    assert max(grad.abs().max() for grad in expected) > 0.01
