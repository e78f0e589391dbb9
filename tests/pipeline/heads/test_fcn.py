import torch

from pipeline.heads.fcn import Fcn


def test_fcn_is_one_linear_layer_on_all_resized_levels():
    levels = [torch.randn(2, width, side, side) for width, side in ((3, 8), (5, 4), (2, 2))]
    fcn = Fcn([3, 5, 2], 4)
    resized = [torch.nn.functional.interpolate(level, size=(8, 8), mode="bilinear") for level in levels]
    weight = torch.cat([score.weight for score in fcn.scores], dim=1)
    bias = sum(score.bias for score in fcn.scores)
    expected = torch.nn.functional.conv2d(torch.cat(resized, dim=1), weight, bias)
    torch.testing.assert_close(fcn(levels), expected, atol=1e-5, rtol=1e-5)
