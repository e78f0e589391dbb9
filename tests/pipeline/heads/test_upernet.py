import pytest
import torch
from terratorch.models.decoders.upernet_decoder import UperNetDecoder as TheirDecoder

from pipeline.heads.dense import HeadList
from pipeline.heads.upernet import UPerNet, UPerNetDecoder, _shares


def test_terratorchs_weights_give_terratorchs_output():
    torch.manual_seed(0)
    widths = [12, 20, 28, 36]
    theirs = TheirDecoder(widths, channels=16, align_corners=True)
    ours = UPerNetDecoder(widths, 16)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    levels = [torch.randn(2, width, side, side) for width, side in zip(widths, (32, 16, 8, 4), strict=True)]
    for mode in (True, False):  # with batch statistics, then with running ones
        torch.testing.assert_close(ours.train(mode)(levels), theirs.train(mode)(list(levels)), rtol=1e-5, atol=1e-5)
    assert {name: p.shape for name, p in ours.named_parameters()} == {
        n: p.shape for n, p in theirs.named_parameters()
    }


def test_logits_have_the_masks_size_and_seeds_their_own_start():
    group = HeadList(lambda: UPerNet([4, 6, 8, 10], 3, 8), (50, 60), seeds=(0, 1, 0))
    levels = [torch.randn(5, width, side, side) for width, side in zip((4, 6, 8, 10), (16, 8, 4, 2), strict=True)]
    index = torch.arange(4).expand(3, -1)
    logits = [logits for _, logits in group.forward_heads(levels, index)]
    assert [tuple(one.shape) for one in logits] == [(1, 4, 3, 50, 60)] * 3
    assert torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], logits[1])
    alone = group.heads[1]([level[:4] for level in levels])
    theirs = torch.nn.functional.interpolate(alone, (50, 60), mode="bilinear")
    torch.testing.assert_close(logits[1][0], theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("side", "scale"), [(4, 1), (4, 3), (4, 6), (7, 6), (14, 6)])
def test_averages_as_products_are_those_of_torch(side, scale):
    maps, shares = torch.randn(2, 3, side, side), _shares(side, scale, torch.device("cpu"))
    wanted = torch.nn.functional.adaptive_avg_pool2d(maps, scale)
    torch.testing.assert_close(shares @ maps @ shares.t(), wanted)
