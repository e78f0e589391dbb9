"""Backbones: frozen networks, their inputs, and the way from stored images to features."""

from pipeline.backbones import catalog as _catalog  # registers the families of this package
from pipeline.backbones.base import create_backbone, get_family, get_spec, register_family

__all__ = ["create_backbone", "get_family", "get_spec", "register_family"]
