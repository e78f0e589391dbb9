import torch
from pipeline.distillation.projectors import Projectors, nearest_level


def test_a_map_is_foretold_from_the_most_similar_grid():
    assert [nearest_level([32, 16, 8, 4], (side, side)) for side in (37, 16, 9, 2)] == [0, 1, 2, 3]
    assert nearest_level([32, 16, 8, 4], ()) is None


def test_shapes_are_those_wanted():
    levels = [torch.randn(2, channels, side, side) for channels, side in ((6, 16), (8, 8))]
    wanted = [(5, 16, 16), (7, 5, 5), (3, 20, 20), (9,)]
    said = Projectors([16, 8], [6, 8], wanted)(levels)
    assert [tuple(one.shape) for one in said] == [(2, *shape) for shape in wanted]


def test_a_map_stays_in_its_place():
    """What the student sees in one corner speaks of the teacher's same corner."""
    level = torch.zeros(1, 6, 16, 16)
    level[..., :4, 12:] = 1
    projectors = Projectors([16], [6], [(5, 4, 4)])
    (said,) = projectors([level])
    apart = (said - projectors([torch.zeros_like(level)])[0]).abs().sum(dim=1)[0]
    assert apart.argmax() == 3
