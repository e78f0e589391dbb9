"""Hiera, the trunk of SAM 2.1's image encoder, built by the package sam2.

Ryali et al. 2023, Ravi et al. 2024. A hierarchical network with four levels of strides 4 to 32. It was trained on
photographs of 1024 px and scores higher on inputs larger than 224 px. The neck after the trunk drops the coarsest
level, so only the trunk is used.

Most blocks attend within windows. If windows do not divide a block's grid, sam2 pads it with zero tokens and does not
mask them. A multiple of 256 px needs none in `sam2.1_hiera_l`, a multiple of 224 px none in the smaller variants.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import sam2
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam2.modeling.backbones.hieradet import Hiera

from pipeline.backbones.base import BackboneSpec, InputBands
from pipeline.backbones.checkpoints import load_strict, read_checkpoint, strip_prefix
from pipeline.backbones.encoder import PyramidNetwork
from pipeline.config import BackboneConfig


def padding_shares(trunk: Hiera, input_size: int) -> tuple[list[float], int]:
    """Compute the share of zero tokens among the keys of each block, and the sides without any.

    Returns:
        The shares, 0 for blocks that attend globally; and the least side in pixels whose multiples have none.
    """
    blocks: Iterable[Any] = trunk.blocks
    shares, multiple, stride = [], 1, trunk.patch_embed.proj.stride[0]
    for block in blocks:
        side, window = input_size // stride, block.window_size  # before the block pools its queries
        padded_side = math.ceil(side / window) * window if window else side
        shares.append(1 - (side / padded_side) ** 2)
        multiple = math.lcm(multiple, stride * (window or 1))
        stride *= block.q_stride[0] if block.q_stride else 1
    return shares, multiple


def create_network(
    backbone: BackboneConfig, spec: BackboneSpec, input_bands: InputBands, weights_dir: Path
) -> PyramidNetwork:
    config = OmegaConf.load(Path(sam2.__file__).parent / f"configs/sam2.1/{backbone.variant}.yaml")
    trunk = instantiate(config.model.image_encoder.trunk)
    shares, multiple = padding_shares(trunk, input_bands.input_size)
    if max(shares):
        print(
            f"{backbone.variant} at {input_bands.input_size} px: up to {max(shares):.0%} of the keys are zero tokens "
            f"in {sum(map(bool, shares))} of {len(shares)} blocks: SAM 2 pads its windows and does not mask them. "
            f"There are none if input_size is a multiple of {multiple}.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    if backbone.weights == "pretrained":
        path = weights_dir / spec.weights_file
        checkpoint = read_checkpoint(path)
        model = checkpoint.get("model")
        tensors = model if isinstance(model, Mapping) else checkpoint
        load_strict(trunk, strip_prefix(tensors, "image_encoder.trunk.", path), path)
    return PyramidNetwork(trunk)
