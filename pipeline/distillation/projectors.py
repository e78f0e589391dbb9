"""From a student's levels to each teacher's features: small linear maps, of use in training alone."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional


class Projectors(nn.Module):
    """One linear map for each array of the teachers.

    A teacher's map (channel, y, x) is foretold from the student's level with the most similar grid, brought to the
    teacher's; a pooled vector (channel,) from the means of all levels of the student.

    Args:
        grids: sides of the student's levels, finest first.
        channels: of these levels.
        wanted: shapes of the teachers' arrays.
    """

    def __init__(self, grids: Sequence[int], channels: Sequence[int], wanted: Sequence[tuple[int, ...]]):
        super().__init__()
        self.wanted = list(wanted)
        self.source = [nearest_level(grids, shape[1:]) for shape in wanted]
        self.maps = nn.ModuleList(
            nn.Linear(sum(channels), shape[0]) if place is None else nn.Conv2d(channels[place], shape[0], 1)
            for shape, place in zip(wanted, self.source, strict=True)
        )

    def forward(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the student says of each array, (batch, channel, …)."""
        pooled = torch.cat([level.mean(dim=(2, 3)) for level in levels], dim=1)
        said = []
        for project, place, shape in zip(self.maps, self.source, self.wanted, strict=True):
            if place is None:
                said.append(project(pooled))
            else:
                said.append(project(_brought(levels[place], shape[1:])))
        return said


def nearest_level(grids: Sequence[int], grid: Sequence[int]) -> int | None:
    """Which of the student's levels has the most similar grid; None of a vector, which has none."""
    if not grid:
        return None
    apart = [max(side, grid[0]) / min(side, grid[0]) for side in grids]
    return apart.index(min(apart))


def _brought(level: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    if tuple(level.shape[-2:]) == tuple(grid):
        return level
    return functional.interpolate(level, size=tuple(grid), mode="bilinear", antialias=True)
