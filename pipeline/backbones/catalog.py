"""Catalog of backbones: catalog.yaml, and the families whose variants params.yaml describes.

This module does not import torch. The networks are in one module per family, named by `FAMILIES`.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path

from pipeline import config
from pipeline.backbones.base import BackboneFamily, BackboneSpec
from pipeline.config import BackboneConfig, HubFile
from pipeline.errors import UserError

# Levels of a network from timm or terratorch.
N_LEVELS = 4


def default_layers(grids: Sequence) -> tuple[int, ...]:
    """Choose four of a network's outputs from their grids (or strides), or all if there are fewer.

    They are those at 1/4, 1/2, 3/4 and 1 of the depth of a plain vision transformer, whose outputs share a grid,
    and the last four of a hierarchical network.
    """
    n_outputs = len(grids)
    if n_outputs <= N_LEVELS or len(set(grids)) > 1:
        return tuple(range(max(0, n_outputs - N_LEVELS), n_outputs))
    return tuple(n_outputs * (level + 1) // N_LEVELS - 1 for level in range(N_LEVELS))


def timm_spec(backbone: BackboneConfig) -> BackboneSpec:
    """Make the specification of one of timm's networks, with the normalisation that timm states for it.

    Raises UserError: no such network, or `layers` or `options` that do not fit it.
    """
    # timm takes 4 s to import with torch, and only this family needs it.
    import timm

    from pipeline.backbones.timm import describe_outputs

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
    outputs = describe_outputs(backbone.variant, len(bands), backbone.options)
    strides = [output["reduction"] for output in outputs]
    indices = _selected_layers(backbone, len(outputs)) or default_layers(strides)
    has_stats = pretrained is not None and len(pretrained.mean) == len(bands)
    return BackboneSpec(
        bands=bands,
        input_units=backbone.input_units or "display",
        mean=pretrained.mean if has_stats else None,
        std=pretrained.std if has_stats else None,
        requires_dataset_stats=not has_stats,
        # The maps of convolutional networks have ceil(input_size / stride) cells: any size is allowed.
        strides=tuple(strides[index] for index in indices) if len(set(strides)) == 1 else (),
        layers=tuple(outputs[index]["module"] for index in indices),
        layer_indices=indices,
        weights=hub,
        options=dict(backbone.options),
    )


def _selected_layers(backbone: BackboneConfig, n_outputs: int) -> tuple[int, ...]:
    """Return the configured layers, counted from 0; UserError unless they are increasing and exist."""
    indices = tuple(index + n_outputs if index < 0 else index for index in backbone.layers)
    if sorted(set(indices)) != list(indices) or not set(indices) <= set(range(n_outputs)):
        raise UserError(
            f"'{backbone.variant}' has {n_outputs} outputs, and its layers in params.yaml are "
            f"{', '.join(map(str, backbone.layers))}. List outputs in increasing order: 0 to {n_outputs - 1}, or "
            "counted from -1, the last.",
            key="layers", value=backbone.layers, allowed=range(-n_outputs, n_outputs),
        )  # fmt: skip
    return indices


def terratorch_spec(backbone: BackboneConfig) -> BackboneSpec:
    """Make the specification of a backbone in terratorch's registry from params.yaml alone."""
    names = [f"output {index}" for index in backbone.layers] or [f"level {index}" for index in range(N_LEVELS)]
    return BackboneSpec(
        bands=tuple(map(str, backbone.bands)) or None,
        input_units=backbone.input_units or "any",
        requires_dataset_stats=True,
        layers=tuple(names),
        layer_indices=backbone.layers,
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
