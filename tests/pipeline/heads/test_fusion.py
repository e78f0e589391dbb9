"""Fusion of pyramids whose grids and numbers of levels differ."""

import pytest
import torch

from pipeline.heads.fusion import FUSIONS, FusedHead, PyramidFusion, get_fusion, match_levels, resize_to_finest

HIERA = [(6, 56, 56), (8, 28, 28), (10, 14, 14), (12, 7, 7)]
PRITHVI = [(8, 14, 14)] * 4
LARGE = [(8, 16, 16)] * 4


def random_levels(*pyramids, batch=2):
    return [torch.randn(batch, *shape) for pyramid in pyramids for shape in pyramid]


def sizes(levels):
    return [tuple(level.shape[1:]) for level in levels]


def test_resize_to_finest_preserves_constants_and_locations():
    fine, coarse = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4)
    coarse[..., 1, 2] = 1
    resized = resize_to_finest([fine, coarse])[1]
    y, x = divmod(int(resized.argmax()), 8)
    assert y in (2, 3)
    assert x in (4, 5)
    torch.testing.assert_close(resize_to_finest([fine, torch.ones(1, 1, 4, 4)])[1], torch.ones(1, 1, 8, 8))


def test_pyramid_fusion_of_pyramids_and_transformers_has_the_finest_grids():
    fusion = PyramidFusion([HIERA, PRITHVI], neck=True)
    assert sizes(fusion(random_levels(HIERA, PRITHVI))) == [(8, 56, 56), (12, 28, 28), (18, 14, 14), (20, 7, 7)]
    assert fusion.channels == [8, 12, 18, 20]
    plain = PyramidFusion([HIERA, PRITHVI, LARGE], neck=False)
    expected = [(22, 56, 56), (24, 28, 28), (26, 16, 16), (28, 16, 16)]
    assert sizes(plain(random_levels(HIERA, PRITHVI, LARGE))) == expected
    assert not list(plain.parameters())


def test_pyramid_fusion_of_one_pyramid_returns_its_levels():
    levels = random_levels(HIERA)
    assert all(fused is level for fused, level in zip(PyramidFusion([HIERA])(levels), levels, strict=True))


def test_match_levels_of_fewer_levels_takes_the_nearest_grid_and_depth():
    resnet = [(2, 112, 112), *HIERA]
    assert match_levels([resnet, HIERA]) == [[0, 0], [1, 0], [2, 1], [3, 2], [4, 3]]
    assert match_levels([HIERA, [(3, 14, 14)] * 2]) == [[0, 0], [1, 0], [2, 1], [3, 1]]
    assert sizes(PyramidFusion([resnet, HIERA])(random_levels(resnet, HIERA)))[0] == (8, 112, 112)


@pytest.mark.parametrize("method", FUSIONS)
def test_fused_head_has_a_gradient_for_every_backbone(method):
    torch.manual_seed(0)
    pyramids = [(3, 8, 8), (4, 4, 4)], [(5, 4, 4), (2, 4, 4)]
    head = FusedHead(PyramidFusion(pyramids, method), lambda channels: torch.nn.Conv2d(channels[0], 2, 1))
    convolve = head.head.forward
    head.head.forward = lambda levels: convolve(levels[0])
    assert head.fusion.channels == ([8, 6] if method == "concat" else [3, 4])
    levels = [level.requires_grad_() for level in random_levels(*pyramids)]
    head(levels).square().sum().backward()
    assert all(levels[index].grad.abs().sum() > 0 for index in (0, 2))


def test_fuse_is_the_formula_of_each_method():
    x, y, z = torch.randn(3, 2, 4, 5, 5)
    torch.testing.assert_close(get_fusion("concat").fuse(x, [y, z], 1), torch.cat([x, y, z], 1))
    torch.testing.assert_close(get_fusion("average").fuse(x, [y, z], 1), (x + y + z) / 3)
    torch.testing.assert_close(get_fusion("dot").fuse(x, [y, z], 1), x * y * z)
    scales, shifts = torch.cat([y, z], 1), torch.cat([z, y], 1)
    torch.testing.assert_close(get_fusion("film").fuse(x, [scales, shifts], 1), x * (1 + y + z) + z + y)
