"""Any backbone of terratorch's registry: `variant` is its name there; params.yaml describes the rest.

`options` are arguments of its constructor. `layers` selects from its outputs; by default the last four. Pretrained
weights are a checkpoint of this very network, from the file that `hub` names.
"""

from pathlib import Path

import torch
from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY

from pipeline.backbones.base import BackboneSpec, FeaturePyramid, InputBands
from pipeline.backbones.checkpoints import load_strict, read_checkpoint
from pipeline.config import BackboneConfig
from pipeline.errors import UserError


class SelectedOutputs(torch.nn.Module):
    """A network of terratorch, from images (batch, band, y, x) to a pyramid of some of its outputs.

    Args:
        variant: its name, for messages.
        indices: of the outputs to use.
    """

    def __init__(self, network: torch.nn.Module, variant: str, indices: tuple[int, ...]):
        super().__init__()
        self.network, self.variant, self.indices = network, variant, indices

    def forward(self, image: torch.Tensor) -> FeaturePyramid:
        outputs = self.network(image)
        try:
            selected = [outputs[index] for index in self.indices]
        except (IndexError, KeyError, TypeError):
            raise UserError(
                f"'{self.variant}' returns {len(outputs)} outputs, without those of index {self.indices}. Set the "
                "backbone's layers in params.yaml to the outputs to use.",
                key="layers",
                value=self.indices,
                allowed=range(len(outputs)),
            ) from None
        is_tokens = selected[0].ndim == 3
        return FeaturePyramid.from_tokens(selected) if is_tokens else FeaturePyramid.from_maps(selected)


def create_network(
    backbone: BackboneConfig, spec: BackboneSpec, input_bands: InputBands, weights_dir: Path
) -> SelectedOutputs:
    """Build the network; see `FamilyModule`.

    Raises:
        UserError: no such backbone, or options that do not fit it.
    """
    variant = backbone.variant
    if variant not in TERRATORCH_BACKBONE_REGISTRY:
        registered = sorted(TERRATORCH_BACKBONE_REGISTRY)
        raise UserError(
            f"terratorch has no backbone '{variant}'. It has: {', '.join(registered)}.",
            key="variant",
            value=variant,
            allowed=registered,
        )
    try:
        network = TERRATORCH_BACKBONE_REGISTRY.build(variant, **spec.options)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"terratorch could not build '{variant}' with the options {spec.options}: {error}. Correct the "
            "backbone's options in params.yaml.",
            key="options",
            value=spec.options,
        ) from None
    if backbone.weights == "pretrained":
        path = Path(weights_dir) / spec.weights_file
        load_strict(network, read_checkpoint(path), path)
    return SelectedOutputs(network, variant, spec.layer_indices)
