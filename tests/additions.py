"""A source, a backbone family, a head and a fusion as a user would write them outside the packages."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipeline.backbones.base import BackboneFamily, BackboneSpec, FeaturePyramid, InputBands
from pipeline.bands import Band
from pipeline.config import BackboneConfig, DatasetConfig, Params
from pipeline.data.image_store import ImageDataset
from pipeline.heads.fusion import Fusion

SIDE = 16
BANDS = (Band("R", "red", 0.66), Band("G", "green", 0.56))


# A source. This module itself satisfies the protocol in pipeline/data/sources/__init__.py.

REQUIRED_KEYS = ("task",)


def fetch(dataset: DatasetConfig, params: Params) -> Mapping[str, object]:
    return {"origin": "drawn from a seed"}


def prepare(raw: Path, dataset: DatasetConfig) -> ImageDataset:
    """Draw images whose bright half is class 1."""
    draw, count = np.random.default_rng(dataset.seed), 48
    masks = np.zeros((count, SIDE, SIDE), np.uint8)
    for mask, edge in zip(masks, draw.integers(4, SIDE - 4, count), strict=True):
        mask[:, edge:] = 1
    image = 60 + 120 * masks[:, None].astype(float) + draw.normal(0, 10, (count, len(BANDS), SIDE, SIDE))
    return ImageDataset(
        sample=[f"s{index:02}" for index in range(count)],
        split=np.repeat(["train", "val", "test"], count // 3).tolist(),
        bands=BANDS, classes=["dark", "bright"], task=dataset.task, units="uint8", gsd=1.0,
        licence="CC0-1.0", source="a random generator", image=image.clip(0, 255).astype(np.uint8), label=masks,
    )  # fmt: skip


# A backbone family: `create_network`, and an entry of the catalog.


class Averages(nn.Module):
    """Two levels: the image, and its averages over 2x2 pixels."""

    def forward(self, image: torch.Tensor) -> FeaturePyramid:
        return FeaturePyramid.from_maps([image, nn.functional.avg_pool2d(image, 2)])


def create_network(
    backbone: BackboneConfig, spec: BackboneSpec, input_bands: InputBands, weights_dir: Path
) -> Averages:
    return Averages()


SPEC = BackboneSpec(
    bands=("red", "green"), input_units="display", mean=None, std=None, strides=(1, 2), layers=("image", "averages")
)
FAMILY = BackboneFamily(module=__name__, variants={"plain": SPEC, "again": SPEC}, has_weights=False)


# A head and a fusion.


class FinestHead(nn.Module):
    """A 1x1 convolution on the finest level.

    Args:
        channels_in: channels of the levels, finest first.
    """

    def __init__(self, channels_in: Sequence[int], n_classes: int, bias: bool = True):
        super().__init__()
        self.scores = nn.Conv2d(channels_in[0], n_classes, 1, bias=bias)

    def forward(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.scores(levels[0])


class SumFusion(Fusion):
    """Sum of the first backbone and the others' projections."""

    def fuse(self, first: torch.Tensor, projected: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        return first + sum(projected)
