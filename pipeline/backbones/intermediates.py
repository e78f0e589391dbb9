"""Intermediate outputs of networks that timm implements, for the families timm and terratorch.

timm applies the final normalisation of a vision transformer to each of its blocks, as DINOv2 does for dense tasks
(Oquab et al. 2023, arXiv 2304.07193), and that of a hierarchical network to its last stage. A normalisation that
follows pooling (ConvNeXt, BEiT) belongs to the classifier and is not applied.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from timm.models.vision_transformer_sam import VisionTransformerSAM

# Hiera defines no normalisation of its maps; SAM's is part of its neck, which has other channels.
_WITHOUT_FINAL_NORM = (Hiera, HieraDet, VisionTransformerSAM)


def outputs_function(network: torch.nn.Module, indices: Sequence[int] | None) -> Callable:
    """Return the function from a network and images to its outputs of increasing `indices`; None: all.

    The outputs are as for `FeaturePyramid.from_outputs`.
    """
    arguments: dict[str, Any] = {"norm": not isinstance(network, _WITHOUT_FINAL_NORM), "indices": indices}
    if "return_prefix_tokens" in inspect.signature(network.forward_intermediates).parameters:
        arguments["return_prefix_tokens"] = True
    return partial(_select_outputs, arguments=arguments)


def _select_outputs(network: torch.nn.Module, image: torch.Tensor, arguments: Mapping[str, Any]) -> list:
    outputs = network.forward_intermediates(image, intermediates_only=True, **arguments)
    if torch.is_tensor(outputs[0]):
        return outputs
    # A class token precedes the registers. Some networks have registers only.
    has_class_token = getattr(network, "cls_token", None) is not None
    return [(level, tokens[:, 0]) if has_class_token else level for level, tokens in outputs]
