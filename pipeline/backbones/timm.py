"""Any network of timm that returns intermediate maps; `variant` is its name there.

Its last four levels are used. Pretrained weights are timm's own file on the hub, at the revision that `hub` names.
"""

from pathlib import Path

import timm
import torch

from pipeline.backbones.base import BackboneSpec, FeaturePyramid, InputBands
from pipeline.backbones.catalog import N_LEVELS
from pipeline.backbones.checkpoints import load_strict, read_checkpoint
from pipeline.config import BackboneConfig
from pipeline.errors import UserError


class IntermediateMaps(torch.nn.Module):
    """A network of timm, from images (batch, band, y, x) to a pyramid of its last levels."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> FeaturePyramid:
        maps = self.network.forward_intermediates(image, indices=N_LEVELS, intermediates_only=True)
        return FeaturePyramid.from_maps(maps)


def create_network(
    backbone: BackboneConfig, spec: BackboneSpec, input_bands: InputBands, weights_dir: Path
) -> IntermediateMaps:
    """Build the network; see `FamilyModule`.

    Raises:
        UserError: a network that does not return intermediate maps.
    """
    network = timm.create_model(backbone.variant, in_chans=len(input_bands.input_names))
    if not hasattr(network, "forward_intermediates"):
        raise UserError(
            f"timm's '{backbone.variant}' does not return intermediate maps. Choose another network.",
            key="variant",
            value=backbone.variant,
        )
    if backbone.weights == "pretrained":
        path = Path(weights_dir) / spec.weights_file
        load_strict(network, read_checkpoint(path), path)
    if hasattr(network, "set_input_size"):  # transformers are built for one size, convolutions work at any
        network.set_input_size(img_size=input_bands.input_size)
    return IntermediateMaps(network)
