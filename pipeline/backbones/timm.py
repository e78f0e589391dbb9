"""Any network of timm that returns intermediate maps; `variant` is its name there.

`options` are arguments of its constructor. `layers` selects from its outputs, which are the blocks of a vision
transformer or the stages of a hierarchical network; by default `catalog.default_layers`. intermediates.py states
their normalisation. Class tokens are pooled features; register tokens are not used.

Pretrained weights are timm's own file on the hub, at the revision that `hub` names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch

from pipeline.backbones.base import BackboneSpec, InputBands
from pipeline.backbones.checkpoints import load_strict, read_checkpoint
from pipeline.backbones.encoder import PyramidNetwork
from pipeline.backbones.intermediates import outputs_function
from pipeline.config import BackboneConfig
from pipeline.errors import UserError

# Arguments of timm's constructors that other keys of params.yaml determine.
_OTHER_KEYS = {
    "checkpoint_path": "hub", "features_only": "layers", "in_chans": "bands", "out_indices": "layers",
    "pretrained": "weights", "pretrained_cfg": "hub", "pretrained_cfg_overlay": "hub",
}  # fmt: skip


def create_network(
    backbone: BackboneConfig, spec: BackboneSpec, input_bands: InputBands, weights_dir: Path
) -> PyramidNetwork:
    """Build the network; UserError if its options do not fit it."""
    network = _build(backbone.variant, len(input_bands.input_names), spec.options)
    if backbone.weights == "pretrained":
        path = weights_dir / spec.weights_file
        load_strict(network, read_checkpoint(path), path)
    if hasattr(network, "set_input_size"):  # transformers are built for one size, convolutions work at any
        network.set_input_size(img_size=input_bands.input_size)
    return PyramidNetwork(network, outputs_function(network, list(spec.layer_indices)))


def describe_outputs(variant: str, n_bands: int, options: Mapping[str, Any]) -> list[dict]:
    """Return timm's description of each output: `module`, its name, and `reduction`, its stride in pixels.

    Raises UserError: a network that does not return intermediate maps, or options that do not fit it.
    """
    with torch.device("meta"):  # allocates no memory
        network = _build(variant, n_bands, options)
    if not hasattr(network, "forward_intermediates"):
        message = f"timm's '{variant}' does not return intermediate maps. Choose another network."
        raise UserError(message, key="variant", value=variant)
    return cast(list[dict], network.feature_info)


def _build(variant: str, n_bands: int, options: Mapping[str, Any]) -> torch.nn.Module:
    for name, key in _OTHER_KEYS.items():
        if name in options:
            message = f"'{variant}' has the option {name} in params.yaml. Remove it and set {key} instead."
            raise UserError(message, key=f"options.{name}", value=options[name], allowed=(key,))
    try:
        return timm.create_model(variant, in_chans=n_bands, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"timm could not build '{variant}' for {n_bands} bands with the options {options}: {error}. Correct the "
            "backbone's options in params.yaml.",
            key="options", value=options,
        ) from None  # fmt: skip
