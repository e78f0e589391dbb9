"""Any backbone of terratorch's registry: `variant` is its name there; params.yaml describes the rest.

`options` are arguments of its constructor. `layers` selects from its outputs; by default the last four. Pretrained
weights are a checkpoint of this very network, from the file that `hub` names.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY

from pipeline.backbones.base import BackboneSpec, InputBands
from pipeline.backbones.checkpoints import load_strict, read_checkpoint
from pipeline.backbones.encoder import PyramidNetwork
from pipeline.config import BackboneConfig
from pipeline.errors import UserError


def create_network(
    backbone: BackboneConfig, spec: BackboneSpec, input_bands: InputBands, weights_dir: Path
) -> PyramidNetwork:
    """Build the network; UserError if there is no such backbone, or the options do not fit it."""
    variant = backbone.variant
    if variant not in TERRATORCH_BACKBONE_REGISTRY:
        registered = sorted(TERRATORCH_BACKBONE_REGISTRY)
        message = f"terratorch has no backbone '{variant}'. It has: {', '.join(registered)}."
        raise UserError(message, key="variant", value=variant, allowed=registered)
    try:
        network = TERRATORCH_BACKBONE_REGISTRY.build(variant, **spec.options)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"terratorch could not build '{variant}' with the options {spec.options}: {error}. Correct the "
            "backbone's options in params.yaml.",
            key="options", value=spec.options,
        ) from None  # fmt: skip
    if backbone.weights == "pretrained":
        path = weights_dir / spec.weights_file
        load_strict(network, read_checkpoint(path), path)
    return PyramidNetwork(network, partial(_select_outputs, variant=variant, indices=spec.layer_indices))


def _select_outputs(network: torch.nn.Module, image: torch.Tensor, variant: str, indices: Sequence[int]) -> list:
    outputs = network(image)
    try:
        return [outputs[index] for index in indices]
    except (IndexError, KeyError, TypeError):
        raise UserError(
            f"'{variant}' returns {len(outputs)} outputs, without those of index {indices}. Set the backbone's "
            "layers in params.yaml to the outputs to use.",
            key="layers", value=indices, allowed=range(len(outputs)),
        ) from None  # fmt: skip
