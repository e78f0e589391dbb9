"""Members whose grids and numbers of levels differ, joined inside the head."""

import pytest
import torch

from pipeline.heads.fusion import METHODS, FusedHead, PyramidFusion, fuse, match_levels, resize_to_finest

HIERA = [(6, 56, 56), (8, 28, 28), (10, 14, 14), (12, 7, 7)]
PRITHVI = [(8, 14, 14)] * 4
LARGE = [(8, 16, 16)] * 4


def maps(*members, batch=2):
    return [torch.randn(batch, *shape) for member in members for shape in member]


def sizes(levels):
    return [tuple(level.shape[1:]) for level in levels]


def test_bilinear_alignment_keeps_a_constant_and_a_place():
    fine, coarse = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4)
    coarse[..., 1, 2] = 1
    aligned = resize_to_finest([fine, coarse])[1]
    peak = divmod(int(aligned.argmax()), 8)
    assert peak[0] in (2, 3)
    assert peak[1] in (4, 5)
    torch.testing.assert_close(resize_to_finest([fine, torch.ones(1, 1, 4, 4)])[1], torch.ones(1, 1, 8, 8))


def test_a_pyramid_and_transformers_meet_on_the_finest_grids():
    joined = PyramidFusion([HIERA, PRITHVI], neck=True)
    assert sizes(joined(maps(HIERA, PRITHVI))) == [(8, 56, 56), (12, 28, 28), (18, 14, 14), (20, 7, 7)]
    assert joined.channels == [8, 12, 18, 20]
    three = PyramidFusion([HIERA, PRITHVI, LARGE], neck=True)
    assert sizes(three(maps(HIERA, PRITHVI, LARGE))) == [(10, 64, 64), (16, 32, 32), (26, 16, 16), (28, 8, 8)]
    plain = PyramidFusion([HIERA, PRITHVI, LARGE], neck=False)
    assert sizes(plain(maps(HIERA, PRITHVI, LARGE))) == [(22, 56, 56), (24, 28, 28), (26, 16, 16), (28, 16, 16)]
    assert not list(plain.parameters())


def test_a_lone_pyramid_passes_untouched():
    levels = maps(HIERA)
    for one, other in zip(PyramidFusion([HIERA])(levels), levels, strict=True):
        assert one is other


def test_fewer_levels_meet_the_nearest_grid_and_depth():
    resnet = [(2, 112, 112), *HIERA]
    assert match_levels([resnet, HIERA]) == [[0, 0], [1, 0], [2, 1], [3, 2], [4, 3]]
    assert match_levels([HIERA, [(3, 14, 14)] * 2]) == [[0, 0], [1, 0], [2, 1], [3, 1]]
    assert sizes(PyramidFusion([resnet, HIERA])(maps(resnet, HIERA)))[0] == (8, 112, 112)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_from_every_member(method):
    torch.manual_seed(0)
    small = [(3, 8, 8), (4, 4, 4)], [(5, 4, 4), (2, 4, 4)]
    head = FusedHead(PyramidFusion(small, method), lambda channels: torch.nn.Conv2d(channels[0], 2, 1))
    head.head.forward, inner = (lambda levels: inner(levels[0])), head.head.forward
    assert head.join.channels == ([8, 6] if method == "concat" else [3, 4])
    levels = [level.requires_grad_() for level in maps(*small)]
    head(levels).square().sum().backward()
    assert all(levels[place].grad.abs().sum() > 0 for place in (0, 2))


def test_mixing_by_hand():
    x, y, z = torch.randn(3, 2, 4, 5, 5)
    torch.testing.assert_close(fuse("average", x, [y, z], 1), (x + y + z) / 3)
    torch.testing.assert_close(fuse("dot", x, [y, z], 1), x * y * z)
    scales, shifts = torch.cat([y, z], 1), torch.cat([z, y], 1)
    torch.testing.assert_close(fuse("film", x, [scales, shifts], 1), x * (1 + y + z) + z + y)
