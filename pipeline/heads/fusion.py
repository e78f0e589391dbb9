"""Members' features inside a head: grids brought together, then concatenated, averaged, modulated or multiplied.

Concatenation is the paper's. The others are its later version's ablation; in them the first member leads, and the
others are brought to its width by a learned projection:
- `average`: the mean of all.
- `film`: the others scale and shift the first, channel by channel (Perez et al., AAAI 2018).
- `dot`: the product of all, channel by channel (Kim et al., ICLR 2017).
"""

from collections.abc import Callable, Sequence
from math import log2, prod

import torch
from torch import nn

from pipeline.grids import resize
from pipeline.heads.neck import LEVELS, LearnedPyramid

METHODS = ("concat", "average", "film", "dot")
# Channels, height and width of one level.
Shape = tuple[int, int, int]


def resize_to_finest(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Bring maps (sample, channel, y, x) to the finest of their grids, bilinearly."""
    finest = max((part.shape[-2:] for part in parts), key=prod)
    return [part if part.shape[-2:] == finest else resize(part, finest) for part in parts]


def match_levels(shapes: Sequence[Sequence[Shape]]) -> list[list[int]]:
    """Which level of each member meets which: for every joined level, finest first, an index a member.

    Members of as many levels meet level by level. One of fewer levels gives, each time, the level with the
    nearest grid, and among equal grids the one at the nearest relative depth.
    """
    longest = max(shapes, key=len)

    def nearest(member: Sequence[Shape], place: int) -> int:
        def distance(level: int) -> tuple[float, float]:
            depth = level / max(1, len(member) - 1) - place / max(1, len(longest) - 1)
            return abs(log2(prod(member[level][1:]) / prod(longest[place][1:]))), abs(depth)

        return place if len(member) == len(longest) else min(range(len(member)), key=distance)

    return [[nearest(member, place) for member in shapes] for place in range(len(longest))]


def fuse(method: str, first: torch.Tensor, others: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """The first member's features with the others', which are projected (for `film`, to scales and shifts)."""
    if method == "average":
        return (first + sum(others)) / (1 + len(others))
    if method == "film":
        scale, shift = sum(others).chunk(2, dim)
        return first * (1 + scale) + shift
    for other in others:
        first = first * other
    return first


def projection_shapes(method: str, widths: Sequence[int]) -> list[tuple[int, int]]:
    """Channels in and out of each projection that a method needs."""
    return [] if method == "concat" else [(w, widths[0] * (2 if method == "film" else 1)) for w in widths[1:]]


class LevelFusion(nn.Module):
    """One level of every member, (batch, channel, y, x) of any grids, to one map of the finest grid."""

    def __init__(self, method: str, widths: Sequence[int]):
        super().__init__()
        self.method = method
        self.projections = nn.ModuleList(nn.Conv2d(*pair, 1) for pair in projection_shapes(method, widths))
        self.channels = sum(widths) if method == "concat" else widths[0]

    def forward(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        first, *others = resize_to_finest(parts)
        if self.method == "concat":
            return torch.cat([first, *others], dim=1) if others else first
        others = [project(other) for project, other in zip(self.projections, others, strict=True)]
        return fuse(self.method, first, others, dim=1) if others else first


class PyramidFusion(nn.Module):
    """Members' pyramids to one.

    Args:
        shapes: of each member's levels, finest first.
        method: of `METHODS`.
        neck: whether four levels of one grid, a transformer's, become a pyramid first.

    Attributes:
        channels: of the joined levels.
    """

    def __init__(self, shapes: Sequence[Sequence[Shape]], method: str = "concat", neck: bool = True):
        super().__init__()
        self.counts = [len(member) for member in shapes]
        self.necks = nn.ModuleDict()
        pyramids = []
        for place, member in enumerate(shapes):
            if neck and len(member) == LEVELS and len({level[1:] for level in member}) == 1:
                self.necks[str(place)] = LearnedPyramid([level[0] for level in member])
                member = _scaled(self.necks[str(place)].channels, *member[0][1:])
            pyramids.append(member)
        self.pairs = match_levels(pyramids)
        self.mixes = nn.ModuleList(
            LevelFusion(method, [member[level][0] for member, level in zip(pyramids, chosen, strict=True)])
            for chosen in self.pairs
        )
        self.channels = [one.channels for one in self.mixes]

    def forward(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All members' levels, one member after the other, to the joined pyramid, finest first."""
        members, rest = [], list(levels)
        for place, count in enumerate(self.counts):
            taken, rest = rest[:count], rest[count:]
            members.append(self.necks[str(place)](taken) if str(place) in self.necks else taken)
        return [
            mixed([member[level] for member, level in zip(members, chosen, strict=True)])
            for mixed, chosen in zip(self.mixes, self.pairs, strict=True)
        ]


class FusedHead(nn.Module):
    """A head for one pyramid made a head for several members.

    Args:
        join: the members' pyramids to one.
        head: from the joined channels to the head.
    """

    def __init__(self, fusion: PyramidFusion, head: Callable[[Sequence[int]], nn.Module]):
        super().__init__()
        self.join = fusion
        self.head = head(fusion.channels)

    def forward(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.head(self.join(levels))


def _scaled(channels: Sequence[int], height: int, width: int) -> list[Shape]:
    return [
        (one, int(height * scale), int(width * scale)) for one, scale in zip(channels, (4, 2, 1, 0.5), strict=True)
    ]
