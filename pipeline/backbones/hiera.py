"""Hiera, the trunk of SAM 2.1's image encoder, built by the package sam2.

Ryali et al. 2023, Ravi et al. 2024. A hierarchical network with four levels of strides 4 to 32. It was trained on
photographs of 1024 px and scores higher on inputs larger than 224 px. The neck after the trunk drops the coarsest
level, so only the trunk is used.
"""

from collections.abc import Mapping
from pathlib import Path

import sam2
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from pipeline.backbones.base import BackboneSpec, FeaturePyramid, InputBands
from pipeline.backbones.checkpoints import load_strict, read_checkpoint, strip_prefix
from pipeline.config import BackboneConfig


class HieraTrunk(torch.nn.Module):
    """The trunk, from images (batch, 3, y, x) with sides that are multiples of 32 to a pyramid."""

    def __init__(self, trunk: torch.nn.Module):
        super().__init__()
        self.trunk = trunk

    def forward(self, image: torch.Tensor) -> FeaturePyramid:
        return FeaturePyramid.from_maps(self.trunk(image))


def create_network(
    backbone: BackboneConfig, spec: BackboneSpec, input_bands: InputBands, weights_dir: Path
) -> HieraTrunk:
    """Build the network; see `FamilyModule`."""
    config = OmegaConf.load(Path(sam2.__file__).parent / f"configs/sam2.1/{backbone.variant}.yaml")
    trunk = instantiate(config.model.image_encoder.trunk)
    if backbone.weights == "pretrained":
        path = Path(weights_dir) / spec.weights_file
        checkpoint = read_checkpoint(path)
        model = checkpoint.get("model")
        tensors = model if isinstance(model, Mapping) else checkpoint
        load_strict(trunk, strip_prefix(tensors, "image_encoder.trunk.", path), path)
    return HieraTrunk(trunk)
