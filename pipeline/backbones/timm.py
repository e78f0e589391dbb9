"""Any network of timm that returns intermediate maps; `variant` is its name there.

Its last four levels are used. Pretrained weights are timm's own file on the hub, at the revision that `hub` names.
"""

from pathlib import Path

import timm

from pipeline.backbones.base import BackboneSpec, InputBands
from pipeline.backbones.catalog import N_LEVELS
from pipeline.backbones.checkpoints import load_strict, read_checkpoint
from pipeline.backbones.encoder import PyramidNetwork
from pipeline.config import BackboneConfig
from pipeline.errors import UserError


def create_network(
    backbone: BackboneConfig, spec: BackboneSpec, input_bands: InputBands, weights_dir: Path
) -> PyramidNetwork:
    """Build the network; UserError for one that does not return intermediate maps."""
    network = timm.create_model(backbone.variant, in_chans=len(input_bands.input_names))
    if not hasattr(network, "forward_intermediates"):
        message = f"timm's '{backbone.variant}' does not return intermediate maps. Choose another network."
        raise UserError(message, key="variant", value=backbone.variant)
    if backbone.weights == "pretrained":
        path = weights_dir / spec.weights_file
        load_strict(network, read_checkpoint(path), path)
    if hasattr(network, "set_input_size"):  # transformers are built for one size, convolutions work at any
        network.set_input_size(img_size=input_bands.input_size)
    return PyramidNetwork(
        network, lambda net, image: net.forward_intermediates(image, indices=N_LEVELS, intermediates_only=True)
    )
