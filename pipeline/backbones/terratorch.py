"""Any backbone of terratorch's registry: `variant` is its name there; params.yaml describes the rest.

`options` are arguments of its constructor. `layers` selects from its outputs; by default `catalog.default_layers`.
Its wrapper decides which outputs are normalised, except for torchgeo's vision transformers, whose outputs are those
of the family timm. Class tokens are pooled features. Pretrained weights are a checkpoint of this very network, from
the file that `hub` names.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from terratorch.models.backbones import prithvi_vit
from terratorch.models.backbones.dinov3.dinov3_wrapper import DinoV3Wrapper
from terratorch.models.backbones.torchgeo_swin_satlas import SwinEncoderWrapper
from terratorch.models.backbones.torchgeo_vit import ViTEncoderWrapper
from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY

from pipeline.backbones.base import BackboneSpec, InputBands
from pipeline.backbones.catalog import N_LEVELS, default_layers
from pipeline.backbones.checkpoints import load_strict, read_checkpoint
from pipeline.backbones.encoder import PyramidNetwork
from pipeline.backbones.intermediates import outputs_function
from pipeline.config import BackboneConfig
from pipeline.errors import UserError

# Options that load weights, which `weights` and `hub` select.
_WEIGHTS_OPTIONS = ("pretrained", "ckpt_path", "ckpt_data")
_UNKNOWN_OPTION = "an_option_of_no_network"


def create_network(
    backbone: BackboneConfig, spec: BackboneSpec, input_bands: InputBands, weights_dir: Path
) -> PyramidNetwork:
    """Build the network; UserError if there is no such backbone, or the options do not fit it."""
    variant = backbone.variant
    if variant not in TERRATORCH_BACKBONE_REGISTRY:
        registered = sorted(TERRATORCH_BACKBONE_REGISTRY)
        message = f"terratorch has no backbone '{variant}'. It has: {', '.join(registered)}."
        raise UserError(message, key="variant", value=variant, allowed=registered)
    network = _build(variant, spec.options)
    if backbone.weights == "pretrained":
        path = weights_dir / spec.weights_file
        load_strict(network, read_checkpoint(path), path)
    select = partial(
        _select_outputs, get_outputs=_outputs_function(network, spec.options), variant=variant,
        indices=spec.layer_indices,
    )  # fmt: skip
    return PyramidNetwork(network, select)


def _build(variant: str, options: Mapping[str, Any]) -> torch.nn.Module:
    """Build the network; UserError for options that do not fit, have no effect or load weights."""
    builder = TERRATORCH_BACKBONE_REGISTRY[variant]
    for name in _WEIGHTS_OPTIONS:
        if options.get(name):
            message = f"'{variant}' has the option {name} in params.yaml. Remove it and set weights and hub instead."
            raise UserError(message, key=f"options.{name}", value=options[name], allowed=("weights", "hub"))
    if "ckpt_path" in inspect.signature(builder).parameters:  # some builders require it
        options = {"ckpt_path": None, **options}
    try:
        network = TERRATORCH_BACKBONE_REGISTRY.build(variant, **options)
    except (TypeError, ValueError, OSError) as error:
        raise UserError(
            f"terratorch could not build '{variant}' with the options {dict(options)}: {error}. Correct the "
            "backbone's options in params.yaml.",
            key="options", value=options,
        ) from None  # fmt: skip
    functions = [builder]
    if inspect.getmodule(builder) is prithvi_vit:
        functions += [prithvi_vit._create_prithvi, prithvi_vit.PrithviViT]
    allowed = sorted({name for function in functions for name in inspect.signature(function).parameters} - {"kwargs"})
    if (unknown := sorted(set(options) - set(allowed))) and _ignores_unknown_options(variant, options):
        raise UserError(
            f"terratorch ignores the options {', '.join(unknown)} of '{variant}'. Remove them from params.yaml. It "
            f"has the options {', '.join(allowed)}.",
            key="options", value=unknown, allowed=allowed,
        )  # fmt: skip
    return network


def _ignores_unknown_options(variant: str, options: Mapping[str, Any]) -> bool:
    with suppress(TypeError):
        TERRATORCH_BACKBONE_REGISTRY.build(variant, **options, **{_UNKNOWN_OPTION: "x"})
        return True
    return False


def _outputs_function(network: torch.nn.Module, options: Mapping[str, Any]) -> Callable:
    """Return the function from a wrapper and images to outputs for `FeaturePyramid.from_outputs`."""
    if isinstance(network, ViTEncoderWrapper):  # it drops the class token and ignores its option out_indices
        get_outputs = outputs_function(network.vit_model, options.get("out_indices"))
        return lambda wrapper, image: get_outputs(wrapper.vit_model, image)
    if isinstance(network, SwinEncoderWrapper):  # its maps are (batch, y, x, channel)
        return lambda wrapper, image: [level.permute(0, 3, 1, 2) for level in wrapper(image)]
    return _dinov3_outputs if isinstance(network, DinoV3Wrapper) else lambda wrapper, image: wrapper(image)


def _dinov3_outputs(wrapper: DinoV3Wrapper, image: torch.Tensor) -> Sequence:
    """Call DINOv3 without terratorch 1.2's wrapper, which appends the class token to the patches."""
    return wrapper.dinov3.get_intermediate_layers(
        image, n=wrapper.output_indexes, reshape=True, return_class_token=wrapper.return_cls_token
    )


def _select_outputs(
    network: torch.nn.Module, image: torch.Tensor, get_outputs: Callable, variant: str, indices: Sequence[int]
) -> list:
    outputs = get_outputs(network, image)
    maps = [output[0] if isinstance(output, tuple) else output for output in outputs]
    if torch.is_tensor(outputs) or not all(torch.is_tensor(level) and level.ndim in (3, 4) for level in maps):
        message = f"terratorch's '{variant}' does not return a list of maps or tokens. Choose another backbone."
        raise UserError(message, key="variant", value=variant)
    # The grid of a map, or the width of a transformer.
    selected = indices or default_layers([tuple(level.shape[2:]) for level in maps])
    n_outputs, n_levels = len(outputs), len(indices) or N_LEVELS
    if len(selected) != n_levels or not set(selected) <= set(range(-n_outputs, n_outputs)):
        raise UserError(
            f"'{variant}' returns {n_outputs} outputs, and {n_levels} levels are needed. Set the backbone's layers "
            f"in params.yaml to the outputs to use, of 0 to {n_outputs - 1}.",
            key="layers", value=indices, allowed=range(n_outputs),
        )  # fmt: skip
    return [outputs[index] for index in selected]
