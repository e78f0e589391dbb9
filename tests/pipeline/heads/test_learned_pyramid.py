import torch
from terratorch.models.necks import LearnedInterpolateToPyramidal

from pipeline.heads.fusion import LearnedPyramid


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
