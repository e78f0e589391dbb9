import pytest
import torch
from terratorch.models.decoders.upernet_decoder import UperNetDecoder
from terratorch.models.necks import LearnedInterpolateToPyramidal

from pipeline.heads.fusion import LearnedPyramid
from pipeline.heads.upernet import UPerNetDecoder, _pool_weights


def test_upernet_decoder_with_terratorchs_weights_has_its_output():
    torch.manual_seed(0)
    widths = [12, 20, 28, 36]
    reference = UperNetDecoder(widths, channels=16, align_corners=True)
    network = UPerNetDecoder(widths, 16)
    network.load_state_dict(reference.state_dict(), strict=True)
    levels = [torch.randn(2, width, side, side) for width, side in zip(widths, (32, 16, 8, 4), strict=True)]
    for mode in (True, False):  # with batch statistics, then with running ones
        expected = reference.train(mode)(list(levels))
        torch.testing.assert_close(network.train(mode)(levels), expected, rtol=1e-5, atol=1e-5)
    shapes = [{name: p.shape for name, p in decoder.named_parameters()} for decoder in (network, reference)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("side", "scale"), [(4, 1), (4, 3), (4, 6), (7, 6), (14, 6)])
def test_pool_weights_give_torchs_adaptive_average_pool(side, scale):
    maps, weights = torch.randn(2, 3, side, side), _pool_weights(side, scale, torch.device("cpu"))
    expected = torch.nn.functional.adaptive_avg_pool2d(maps, scale)
    torch.testing.assert_close(weights @ maps @ weights.t(), expected)


def test_learned_pyramid_with_terratorchs_weights_has_its_output():
    torch.manual_seed(0)
    widths = [8, 8, 8, 8]
    reference, network = LearnedInterpolateToPyramidal(widths), LearnedPyramid(widths)
    network.load_state_dict(reference.state_dict(), strict=True)
    levels = [torch.randn(2, 8, 14, 14) for _ in widths]
    for training in (True, False):
        expected = reference.train(training)(list(levels))
        for actual, level in zip(network.train(training)(levels), expected, strict=True):
            torch.testing.assert_close(actual, level)
    assert network.channels == reference.process_channel_list(widths)
    assert [level.shape[-1] for level in expected] == [56, 28, 14, 7]
