"""One file a family of backbones, looked up by its name.

A family defines `build(variant, weights, folder, seed, seen, declared)`, which returns a torch module from a
normalised batch to a `Pyramid`, and declares what it has: `VARIANTS`, a `Spec` by name, or, for families whose
members params.yaml describes, `describe(backbone)`. One that has nothing to learn says `LEARNS = False`. torch is
imported inside functions alone.
"""

import dataclasses
import importlib
import pkgutil
from pathlib import Path

from pipeline.backbones.base import BackboneSpec, InputBands
from pipeline.config import BackboneConfig
from pipeline.errors import UserError


def get_family(name: str):
    """The module of a family.

    Raises:
        UserError: no such file here; the message lists those that are.
    """
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    if name not in known:
        raise UserError(f"There is no backbone family '{name}'. Families in pipeline/backbones: {', '.join(known)}.")
    return importlib.import_module(f"{__name__}.{name}")


def get_spec(backbone: BackboneConfig) -> BackboneSpec:
    """The declaration of a backbone.

    Raises:
        UserError: no such family or variant, or a description that does not fit it.
    """
    module = get_family(backbone.family)
    if hasattr(module, "describe"):
        return _checked(module.describe(backbone), backbone)
    if backbone.variant not in module.VARIANTS:
        raise UserError(
            f"Family '{backbone.family}' has no variant '{backbone.variant}'. It has: {', '.join(module.VARIANTS)}."
        )
    for key in ("eats", "layers", "options"):
        if getattr(backbone, key):
            raise UserError(f"Family '{backbone.family}' declares its own {key}; remove it from params.yaml.")
    declared = module.VARIANTS[backbone.variant]
    if backbone.hub:
        declared = dataclasses.replace(declared, weights=backbone.hub, weights_file=Path(backbone.hub.file).name)
    return _checked(declared, backbone)


def create_backbone(backbone: BackboneConfig, declared: BackboneSpec, seen: InputBands, folder: Path):
    """The frozen network, with the weights that `folder` holds or that are drawn from the seed."""
    network = get_family(backbone.family).build(
        backbone.variant, backbone.weights, folder, backbone.seed, seen, declared
    )
    return network.eval().requires_grad_(False)


def _checked(declared: BackboneSpec, backbone: BackboneConfig) -> BackboneSpec:
    multiple = max(declared.strides, default=1)
    if backbone.input_size % multiple:
        raise UserError(
            f"{backbone.variant} has input_size {backbone.input_size}; it must be a multiple of {multiple}, the "
            "stride of its deepest level."
        )
    if backbone.normalisation == "native" and declared.standardise:
        raise UserError(f"{backbone.variant} has no normalisation of its own. Set its normalisation to dataset.")
    learns = getattr(get_family(backbone.family), "LEARNS", True)
    if learns == (backbone.weights == "none"):
        right = "pretrained or random" if learns else "none"
        raise UserError(f"{backbone.variant} has weights: {backbone.weights}; set it to {right}.")
    if backbone.weights == "pretrained" and declared.weights is None:
        raise UserError(f"No trained weights of {backbone.variant} are known. Set its weights to random.")
    return declared
