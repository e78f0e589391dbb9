import torch
from pipeline.heads.neck import LearnedPyramid
from terratorch.models.necks import LearnedInterpolateToPyramidal


def test_terratorchs_weights_give_terratorchs_output():
    torch.manual_seed(0)
    widths = [8, 8, 8, 8]
    theirs, ours = LearnedInterpolateToPyramidal(widths), LearnedPyramid(widths)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    levels = [torch.randn(2, 8, 14, 14) for _ in widths]
    for training in (True, False):
        expected = theirs.train(training)(list(levels))
        for one, other in zip(ours.train(training)(levels), expected, strict=True):
            torch.testing.assert_close(one, other)
    assert ours.channels == theirs.process_channel_list(widths)
    assert [one.shape[-1] for one in expected] == [56, 28, 14, 7]
