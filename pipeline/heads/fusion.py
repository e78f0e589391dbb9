"""Fusion of the backbones' feature pyramids inside a head.

Levels are matched between pyramids, resized to the finest grid, and combined by a method of `FUSIONS`. The paper
concatenates (arXiv 2506.20174); the other methods, which first project the other backbones to the channels of the
first, are the ablation of its later version. A new method is one class and one call of `register_fusion`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import islice
from math import log2, prod

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.feature_ops import resize

# Channels, height and width of a level.
LevelShape = tuple[int, int, int]
# Number of levels that a vision transformer's pyramid is made from.
TRANSFORMER_LEVELS = 4


class Fusion(ABC):
    """A method that combines features of the same grid; it has no parameters."""

    def projection_shapes(self, widths: Sequence[int]) -> list[tuple[int, int]]:
        """Return the channels in and out of the projections of all backbones but the first."""
        return [(width, widths[0]) for width in widths[1:]]

    def fused_width(self, widths: Sequence[int]) -> int:
        """Return the number of channels of the result."""
        return widths[0]

    @abstractmethod
    def fuse(self, first: torch.Tensor, projected: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """Combine the first backbone's features with the others' projected ones; channels lie along `dim`."""


class ConcatFusion(Fusion):
    """Concatenation along channels."""

    def projection_shapes(self, widths: Sequence[int]) -> list[tuple[int, int]]:
        return []

    def fused_width(self, widths: Sequence[int]) -> int:
        return sum(widths)

    def fuse(self, first: torch.Tensor, projected: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        return torch.cat([first, *projected], dim=dim)


class AverageFusion(Fusion):
    """Mean over the backbones."""

    def fuse(self, first: torch.Tensor, projected: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        return (first + sum(projected)) / (1 + len(projected))


class FilmFusion(Fusion):
    """FiLM (Perez et al., AAAI 2018): the others scale and shift the first backbone's channels."""

    def projection_shapes(self, widths: Sequence[int]) -> list[tuple[int, int]]:
        return [(width, 2 * widths[0]) for width in widths[1:]]

    def fuse(self, first: torch.Tensor, projected: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        scale, shift = sum(projected).chunk(2, dim)
        return first * (1 + scale) + shift


class DotFusion(Fusion):
    """Product of the backbones, channel by channel (Kim et al., ICLR 2017)."""

    def fuse(self, first: torch.Tensor, projected: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        return prod(projected, start=first)


FUSIONS: dict[str, type[Fusion]] = {
    "concat": ConcatFusion, "average": AverageFusion, "film": FilmFusion, "dot": DotFusion,
}  # fmt: skip


def register_fusion(name: str, fusion: type[Fusion]) -> None:
    """Add a fusion method, chosen by `heads.fusion`; a name that is taken raises ValueError."""
    if name in FUSIONS:
        raise ValueError(f"There is already a fusion called '{name}'.")
    FUSIONS[name] = fusion


def get_fusion(name: str) -> Fusion:
    """Return a fusion method by its name, or raise UserError."""
    if name not in FUSIONS:
        message = f"heads.fusion is '{name}'. Choose one of: {', '.join(FUSIONS)}."
        raise UserError(message, key="heads.fusion", value=name, allowed=FUSIONS)
    return FUSIONS[name]()


def resize_to_finest(levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Resize maps (sample, channel, y, x) to the finest of their grids, bilinearly."""
    finest = max((level.shape[-2:] for level in levels), key=prod)
    return [level if level.shape[-2:] == finest else resize(level, finest) for level in levels]


def match_levels(shapes: Sequence[Sequence[LevelShape]]) -> list[list[int]]:
    """Match the levels of several pyramids.

    Pyramids with as many levels as the longest are matched level by level. From a shorter one, each time
    the level of the most similar grid is used; among equal grids, the one at the most similar relative depth.

    Returns:
        For every fused level, finest first: the index of each pyramid's level.
    """
    longest = max(shapes, key=len)

    def nearest(pyramid: Sequence[LevelShape], index: int) -> int:
        def distance(level: int) -> tuple[float, float]:
            depth = level / max(1, len(pyramid) - 1) - index / max(1, len(longest) - 1)
            return abs(log2(prod(pyramid[level][1:]) / prod(longest[index][1:]))), abs(depth)

        return index if len(pyramid) == len(longest) else min(range(len(pyramid)), key=distance)

    return [[nearest(pyramid, index) for pyramid in shapes] for index in range(len(longest))]


class LevelFusion(nn.Module):
    """Fuse one level (batch, channel, y, x) of every backbone to a map of the finest grid."""

    def __init__(self, method: str, widths: Sequence[int]):
        super().__init__()
        self.fusion = get_fusion(method)
        self.projections = nn.ModuleList(nn.Conv2d(*shape, 1) for shape in self.fusion.projection_shapes(widths))
        self.channels = self.fusion.fused_width(widths)

    def forward(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        first, *features = resize_to_finest(levels)
        if not features:
            return first
        if self.projections:
            features = [project(level) for project, level in zip(self.projections, features, strict=True)]
        return self.fusion.fuse(first, features, dim=1)


class PyramidFusion(nn.Module):
    """Fuse the pyramids of several backbones to one, whose levels have `channels` channels.

    `neck` first resamples four levels of one grid, as a vision transformer's, to a pyramid.
    """

    def __init__(self, shapes: Sequence[Sequence[LevelShape]], method: str = "concat", neck: bool = True):
        super().__init__()
        self.n_levels = [len(levels) for levels in shapes]
        self.necks = nn.ModuleDict()
        pyramids = []
        for index, levels in enumerate(shapes):
            if neck and len(levels) == TRANSFORMER_LEVELS and len({level[1:] for level in levels}) == 1:
                self.necks[str(index)] = LearnedPyramid([level[0] for level in levels])
                levels = self.necks[str(index)].shapes(*levels[0][1:])
            pyramids.append(levels)
        self.matches = match_levels(pyramids)
        self.fusions = nn.ModuleList(
            LevelFusion(method, [levels[index][0] for levels, index in zip(pyramids, match, strict=True)])
            for match in self.matches
        )
        self.channels = [fusion.channels for fusion in self.fusions]

    def forward(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Fuse the levels of all backbones, one backbone after the other, to one pyramid, finest first."""
        remaining = iter(levels)
        pyramids = [list(islice(remaining, count)) for count in self.n_levels]
        for index, neck in self.necks.items():
            pyramids[int(index)] = neck(pyramids[int(index)])
        return [
            fusion([pyramid[index] for pyramid, index in zip(pyramids, match, strict=True)])
            for fusion, match in zip(self.fusions, self.matches, strict=True)
        ]


class FusedHead(nn.Module):
    """A head on the fused pyramid of backbones; `make_head` takes the channels of the fused levels."""

    def __init__(self, fusion: PyramidFusion, make_head: Callable[[Sequence[int]], nn.Module]):
        super().__init__()
        self.fusion = fusion
        self.head = make_head(fusion.channels)

    def forward(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.head(self.fusion(levels))


class LearnedPyramid(nn.Module):
    """Resample a vision transformer's four levels of one grid to 4, 2, 1 and 1/2 times its sides.

    The same network and parameter names as `LearnedInterpolateToPyramidal` of terratorch 1.2; a test compares the
    outputs. It is a copy because terratorch takes 6 to 10 s to import.
    """

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        first, second, third, fourth = channels
        self.channels = [first // 4, second // 2, third, fourth]
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(first, first // 2, 2, 2),
            nn.BatchNorm2d(first // 2),
            nn.GELU(),
            nn.ConvTranspose2d(first // 2, first // 4, 2, 2),
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(second, second // 2, 2, 2))
        self.fpn3 = nn.Sequential(nn.Identity())
        self.fpn4 = nn.Sequential(nn.MaxPool2d(2, 2))

    def shapes(self, height: int, width: int) -> list[LevelShape]:
        scales = zip(self.channels, (4, 2, 1, 0.5), strict=True)
        return [(count, int(height * scale), int(width * scale)) for count, scale in scales]

    def forward(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        resamplers = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [resample(level) for resample, level in zip(resamplers, levels, strict=True)]
