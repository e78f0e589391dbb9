"""What a head is built from: enough to make groups of it, and one again from a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from pipeline.heads.dense import HeadList
from pipeline.heads.fcn import Fcn
from pipeline.heads.fusion import FusedHead, PyramidFusion, fuse, projection_shapes
from pipeline.heads.linear import StackedLinear
from pipeline.heads.upernet import UPerNet


@dataclass(frozen=True)
class HeadConfig:
    """A head for a model's features.

    Attributes:
        head: `linear` on pooled vectors, `upernet` or `fcn` on levels.
        fusion: how members are joined (pipeline/heads/fusion.py).
        shapes: of each member's arrays, (channel,) or (channel, y, x).
        classes: how many.
        size: of the masks, (y, x); none of pooled vectors.
        channels: of a UPerNet's decoder.
        neck: whether a transformer's levels become a pyramid first.
        precision: of dense heads, float32 or bfloat16.
    """

    head: str
    fusion: str
    shapes: tuple[tuple[tuple[int, ...], ...], ...]
    n_classes: int
    output_size: tuple[int, ...] = ()
    channels: int = 0
    neck: bool = False
    precision: str = "float32"

    def create_group(self, seeds: Sequence[int]) -> StackedLinear | HeadList:
        """Heads, one a seed, not yet trained."""
        if self.head == "linear":
            widths = [sum(shape[0] for shape in member) for member in self.shapes]
            mixed = partial(fuse, self.fusion, dim=2)
            return StackedLinear(widths, self.n_classes, seeds, projection_shapes(self.fusion, widths), mixed)
        return HeadList(self._dense, self.output_size, seeds, self.precision)

    def _dense(self) -> FusedHead:
        return FusedHead(PyramidFusion(self.shapes, self.fusion, self.neck), self._head)

    def _head(self, channels: Sequence[int]) -> torch.nn.Module:
        if self.head == "fcn":
            return Fcn(channels, self.n_classes)
        return UPerNet(channels, self.channels, self.n_classes)


def describe_head(config: HeadConfig, array_names: Sequence[Sequence[str]], has_class_weights: bool) -> str:
    """What is trained, and on what: upernet of 16 channels, concat, level0, level1, balanced class weights.

    Args:
        fields: of each member, the names of the arrays that are read.
        balanced: whether the classes are weighted.
    """
    arrays = [name.removeprefix("pooled/").removesuffix("/features") for member in array_names for name in member]
    parts = [
        f"{config.head} of {config.channels} channels" if config.channels else config.head,
        *([config.fusion] if len(array_names) > 1 else []),
        *dict.fromkeys(arrays),
        *(["balanced class weights"] if has_class_weights else []),
    ]
    return ", ".join(parts)
