"""Any backbone of terratorch's registry: `variant` is its name there, and params.yaml says the rest.

`options` go to its constructor as they are; `layers` picks from its outputs, of which the last four are taken
otherwise. Trained weights are a checkpoint of this very network, at the place that `hub` names.
"""

from pathlib import Path

from pipeline.backbones.base import BackboneSpec, InputBands, from_maps, from_tokens
from pipeline.config import BackboneConfig
from pipeline.errors import UserError

LEVELS = 4


def describe(backbone: BackboneConfig) -> BackboneSpec:
    """The declaration that params.yaml makes; terratorch is asked nothing until the network is built."""
    chosen = backbone.layers or range(-LEVELS, 0)
    return BackboneSpec(
        bands=tuple(map(str, backbone.bands)) or None,
        input_units=backbone.input_units or "unit",
        mean=None,
        std=None,
        requires_dataset_stats=True,
        strides=(),
        layers=tuple(f"output {index}" for index in chosen),
        weights=backbone.hub,
        weights_file=Path(backbone.hub.file).name if backbone.hub else None,
        layer_indices=tuple(chosen),
        options=dict(backbone.options),
    )


def build(variant: str, weights: str, folder: Path, seed: int, seen: InputBands, declared: BackboneSpec):
    """A frozen torch module from (batch, band, y, x) to a Pyramid."""
    import torch
    from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY

    from pipeline.backbones.checkpoints import load_strict, read_checkpoint

    class Outputs(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, image):
            outputs = self.network(image)
            try:
                chosen = [outputs[index] for index in declared.layer_indices]
            except (IndexError, KeyError, TypeError):
                raise UserError(
                    f"'{variant}' gives {len(outputs)} outputs, not those numbered {declared.layer_indices}. Name "
                    "those to take as its 'layers' in params.yaml."
                ) from None
            return from_tokens(chosen) if chosen[0].ndim == 3 else from_maps(chosen)

    if variant not in TERRATORCH_BACKBONE_REGISTRY:
        raise UserError(
            f"terratorch has no backbone '{variant}'. It has: {', '.join(sorted(TERRATORCH_BACKBONE_REGISTRY))}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = TERRATORCH_BACKBONE_REGISTRY.build(variant, **declared.options)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"terratorch could not build '{variant}' with the options {declared.options}: {error}"
            ) from None
    if weights == "pretrained":
        path = Path(folder) / declared.weights_file
        load_strict(network, read_checkpoint(path), path)
    return Outputs(network)
