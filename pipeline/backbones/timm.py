"""Any network of timm that gives maps: `variant` is its name there, and params.yaml says the rest.

Its last four levels are taken. Trained weights are timm's own file on the hub, at the revision that `hub` names.
"""

import difflib
from pathlib import Path

from pipeline.backbones.base import BackboneSpec, InputBands, from_maps
from pipeline.config import BackboneConfig, HubFile
from pipeline.errors import UserError

LEVELS = 4


def describe(backbone: BackboneConfig) -> BackboneSpec:
    """The declaration, with the normalisation that timm states.

    Raises:
        UserError: no such network.
    """
    import timm

    if not timm.is_model(backbone.variant):
        near = difflib.get_close_matches(backbone.variant, timm.list_models(), n=6)
        raise UserError(f"timm has no network '{backbone.variant}'. Similar ones: {', '.join(near) or 'none'}.")
    known = timm.get_pretrained_cfg(backbone.variant)
    hub = backbone.hub
    if hub is None and known and known.hf_hub_id:
        hub = HubFile(known.hf_hub_id, "model.safetensors", "", licence=known.license or "see the repository")
    bands = tuple(map(str, backbone.bands)) or ("red", "green", "blue")
    own = known is not None and len(known.mean) == len(bands)
    return BackboneSpec(
        bands=bands,
        input_units=backbone.input_units or "display",
        mean=known.mean if own else None,
        std=known.std if own else None,
        requires_dataset_stats=not own,
        strides=(),
        layers=tuple(f"level {index} of the last {LEVELS}" for index in range(LEVELS)),
        weights=hub,
        weights_file=Path(hub.file).name if hub else None,
    )


def build(variant: str, weights: str, folder: Path, seed: int, seen: InputBands, declared: BackboneSpec):
    """A frozen torch module from (batch, band, y, x) to a Pyramid."""
    import timm
    import torch

    from pipeline.backbones.checkpoints import load_strict, read_checkpoint

    class Maps(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, image):
            return from_maps(self.network.forward_intermediates(image, indices=LEVELS, intermediates_only=True))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = timm.create_model(variant, in_chans=len(seen.input_names))
    if not hasattr(network, "forward_intermediates"):
        raise UserError(f"timm's '{variant}' does not give its inner maps. Choose another network.")
    if weights == "pretrained":
        path = Path(folder) / declared.weights_file
        load_strict(network, read_checkpoint(path), path)
    if hasattr(network, "set_input_size"):  # transformers are made for a size, convolutions for any
        network.set_input_size(img_size=seen.input_size)
    return Maps(network)
