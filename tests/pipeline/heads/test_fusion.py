"""Fusion of pyramids whose grids and numbers of levels differ."""

import pytest
import torch

from pipeline.heads.fusion import FUSIONS, PyramidFusion, get_fusion, match_levels

HIERA = [(6, 56, 56), (8, 28, 28), (10, 14, 14), (12, 7, 7)]
PRITHVI = [(8, 14, 14)] * 4
LARGE = [(8, 16, 16)] * 4


def random_levels(*pyramids, batch=2):
    return [torch.randn(batch, *shape) for pyramid in pyramids for shape in pyramid]


def sizes(levels):
    return [tuple(level.shape[1:]) for level in levels]


def test_pyramid_fusion_of_pyramids_and_transformers_has_the_finest_grids():
    fusion = PyramidFusion([HIERA, PRITHVI], neck=True)
    assert sizes(fusion(random_levels(HIERA, PRITHVI))) == [(8, 56, 56), (12, 28, 28), (18, 14, 14), (20, 7, 7)]
    assert fusion.channels == [8, 12, 18, 20]
    plain = PyramidFusion([HIERA, PRITHVI, LARGE], neck=False)
    expected = [(22, 56, 56), (24, 28, 28), (26, 16, 16), (28, 16, 16)]
    assert sizes(plain(random_levels(HIERA, PRITHVI, LARGE))) == expected
    assert not list(plain.parameters())


def test_match_levels_of_fewer_levels_takes_the_nearest_grid_and_depth():
    resnet = [(2, 112, 112), *HIERA]
    assert match_levels([resnet, HIERA]) == [[0, 0], [1, 0], [2, 1], [3, 2], [4, 3]]
    assert match_levels([HIERA, [(3, 14, 14)] * 2]) == [[0, 0], [1, 0], [2, 1], [3, 1]]
    assert sizes(PyramidFusion([resnet, HIERA])(random_levels(resnet, HIERA)))[0] == (8, 112, 112)


@pytest.mark.parametrize("method", FUSIONS)
def test_pyramid_fusion_has_a_gradient_for_every_level(method):
    torch.manual_seed(0)
    pyramids = [(3, 8, 8), (4, 4, 4)], [(5, 4, 4), (2, 4, 4)]
    fusion = PyramidFusion(pyramids, method)
    assert fusion.channels == ([8, 6] if method == "concat" else [3, 4])
    levels = [level.requires_grad_() for level in random_levels(*pyramids)]
    sum(level.square().sum() for level in fusion(levels)).backward()
    assert all(level.grad.abs().sum() > 0 for level in levels)


def test_fuse_is_the_formula_of_each_method():
    x, y, z = torch.randn(3, 2, 4, 5, 5)
    torch.testing.assert_close(get_fusion("concat").fuse(x, [y, z], 1), torch.cat([x, y, z], 1))
    torch.testing.assert_close(get_fusion("average").fuse(x, [y, z], 1), (x + y + z) / 3)
    torch.testing.assert_close(get_fusion("dot").fuse(x, [y, z], 1), x * y * z)
    scales, shifts = torch.cat([y, z], 1), torch.cat([z, y], 1)
    torch.testing.assert_close(get_fusion("film").fuse(x, [scales, shifts], 1), x * (1 + y + z) + z + y)
