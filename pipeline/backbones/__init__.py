"""Backbones: frozen networks, their inputs, and the encoding of stored images."""

from pipeline.backbones.base import create_backbone, get_family, get_spec, register_family
from pipeline.backbones.catalog import FAMILIES

for _name, _family in FAMILIES.items():
    register_family(_name, _family)

__all__ = ["create_backbone", "get_family", "get_spec", "register_family"]
