"""Hiera, the trunk of SAM 2.1's image encoder, built by the package sam2.

Ryali et al. 2023, Ravi et al. 2024. A hierarchical network with four levels of strides 4 to 32. It was trained on
photographs of 1024 px and scores higher on inputs larger than 224 px. The neck after the trunk drops the coarsest
level, so only the trunk is used.
"""

from collections.abc import Mapping
from pathlib import Path

import sam2
from hydra.utils import instantiate
from omegaconf import OmegaConf

from pipeline.backbones.base import BackboneSpec, InputBands
from pipeline.backbones.checkpoints import load_strict, read_checkpoint, strip_prefix
from pipeline.backbones.encoder import PyramidNetwork
from pipeline.config import BackboneConfig


def create_network(
    backbone: BackboneConfig, spec: BackboneSpec, input_bands: InputBands, weights_dir: Path
) -> PyramidNetwork:
    config = OmegaConf.load(Path(sam2.__file__).parent / f"configs/sam2.1/{backbone.variant}.yaml")
    trunk = instantiate(config.model.image_encoder.trunk)
    if backbone.weights == "pretrained":
        path = weights_dir / spec.weights_file
        checkpoint = read_checkpoint(path)
        model = checkpoint.get("model")
        tensors = model if isinstance(model, Mapping) else checkpoint
        load_strict(trunk, strip_prefix(tensors, "image_encoder.trunk.", path), path)
    return PyramidNetwork(trunk)
