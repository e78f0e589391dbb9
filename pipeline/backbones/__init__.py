"""One file a family of backbones, looked up by its name.

A family defines `VARIANTS`, a `Spec` by name, and `build(variant, weights, folder, seed)`, which returns a
torch module from a normalised batch to a `Pyramid`. torch is imported inside `build` alone.
"""

import importlib
import pkgutil

from pipeline.errors import UserError
from pipeline.pyramid import Spec


def family(name: str):
    """The module of a family.

    Raises:
        UserError: no such file here; the message lists those that are.
    """
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    if name not in known:
        raise UserError(f"There is no backbone family '{name}'. Families in pipeline/backbones: {', '.join(known)}.")
    return importlib.import_module(f"{__name__}.{name}")


def spec(family_name: str, variant: str) -> Spec:
    """The declaration of a family's variant.

    Raises:
        UserError: no such family or variant; the message lists those that are.
    """
    variants = family(family_name).VARIANTS
    if variant not in variants:
        raise UserError(f"Family '{family_name}' has no variant '{variant}'. It has: {', '.join(variants)}.")
    return variants[variant]
