import pytest
import torch
from terratorch.models.decoders.upernet_decoder import UperNetDecoder
from terratorch.models.necks import LearnedInterpolateToPyramidal

from pipeline.heads.fusion import LearnedPyramid
from pipeline.heads.upernet import UPerNetDecoder, _pool_weights

WIDTHS = [12, 20, 28, 36]


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
