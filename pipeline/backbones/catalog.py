"""Catalog of backbones: catalog.yaml, and the families whose variants params.yaml describes.

This module does not import torch. The networks are in one module per family, named by `FAMILIES`.
"""

import difflib
from pathlib import Path

from pipeline import config
from pipeline.backbones.base import BackboneFamily, BackboneSpec
from pipeline.config import BackboneConfig, HubFile
from pipeline.errors import UserError

# Levels of a network from timm or terratorch: the last of its outputs.
N_LEVELS = 4


def timm_spec(backbone: BackboneConfig) -> BackboneSpec:
    """Make the specification of one of timm's networks, with the normalisation that timm states for it.

    Raises UserError: no such network.
    """
    # timm takes 4 s to import with torch, and only this family needs it.
    import timm

    if not timm.is_model(backbone.variant):
        similar = difflib.get_close_matches(backbone.variant, timm.list_models(), n=6)
        message = f"timm has no network '{backbone.variant}'. Similar ones: {', '.join(similar) or 'none'}."
        raise UserError(message, key="variant", value=backbone.variant, allowed=similar)
    pretrained = timm.get_pretrained_cfg(backbone.variant)
    hub = backbone.hub
    if hub is None and pretrained and pretrained.hf_hub_id:
        licence = pretrained.license or "see the repository"
        hub = HubFile(pretrained.hf_hub_id, "model.safetensors", "", licence=licence)
    bands = tuple(map(str, backbone.bands)) or ("red", "green", "blue")
    has_stats = pretrained is not None and len(pretrained.mean) == len(bands)
    return BackboneSpec(
        bands=bands,
        input_units=backbone.input_units or "display",
        mean=pretrained.mean if has_stats else None,
        std=pretrained.std if has_stats else None,
        requires_dataset_stats=not has_stats,
        layers=tuple(f"level {index} of the last {N_LEVELS}" for index in range(N_LEVELS)),
        weights=hub,
    )


def terratorch_spec(backbone: BackboneConfig) -> BackboneSpec:
    """Make the specification of a backbone in terratorch's registry from params.yaml alone."""
    indices = backbone.layers or tuple(range(-N_LEVELS, 0))
    return BackboneSpec(
        bands=tuple(map(str, backbone.bands)) or None,
        input_units=backbone.input_units or "any",
        requires_dataset_stats=True,
        layers=tuple(f"output {index}" for index in indices),
        layer_indices=indices,
        weights=backbone.hub,
        options=dict(backbone.options),
    )


_FILE = Path(__file__).with_suffix(".yaml")
_SPECS = config.parse(dict[str, dict[str, BackboneSpec]], config.read_yaml(_FILE), path=_FILE)
BAND_STATISTICS, DOFA, EFFICIENTNET, HIERA, PRITHVI = (
    _SPECS[family] for family in ("band_statistics", "dofa", "efficientnet", "hiera", "prithvi")
)
FAMILIES = {
    "band_statistics": BackboneFamily("pipeline.backbones.band_statistics", BAND_STATISTICS, has_weights=False),
    "dofa": BackboneFamily("pipeline.backbones.dofa", DOFA),
    "efficientnet": BackboneFamily("pipeline.backbones.efficientnet", EFFICIENTNET),
    "hiera": BackboneFamily("pipeline.backbones.hiera", HIERA),
    "prithvi": BackboneFamily("pipeline.backbones.prithvi", PRITHVI),
    "terratorch": BackboneFamily("pipeline.backbones.terratorch", spec_from_config=terratorch_spec),
    "timm": BackboneFamily("pipeline.backbones.timm", spec_from_config=timm_spec),
}
