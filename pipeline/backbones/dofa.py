"""DOFA (Xiong et al. 2024, arXiv 2403.15356), built by terratorch from torchgeo's network.

A vision transformer whose patch embedding is made from the wavelengths of the bands, so it takes any bands in any
order as long as their wavelengths go with them. Its outputs are not normalised, and it has no normalisation of its
inputs of its own: standardise by the dataset.
"""

from pathlib import Path

from pipeline.backbones.base import BackboneSpec, InputBands, from_tokens
from pipeline.config import HubFile
from pipeline.errors import UserError

_REVISION = "b8db318b64a90b9e085ec04ba8851233c5893666"
OUTPUTS = {
    "dofa_small_patch16_224": (2, 5, 8, 11),
    "dofa_base_patch16_224": (2, 5, 8, 11),
    "dofa_large_patch16_224": (5, 11, 17, 23),
}


def _spec(variant: str, sha256: str | None = None, size: int = 0) -> BackboneSpec:
    file = f"{variant}-{sha256[:8]}.pth" if sha256 else None
    return BackboneSpec(
        bands=None,
        input_units="unit",
        mean=None,
        std=None,
        requires_dataset_stats=True,
        strides=(16,) * 4,
        layers=tuple(f"blocks.{block}" for block in OUTPUTS[variant]),
        weights=HubFile("torchgeo/dofa", file, _REVISION, sha256, size, "CC-BY-4.0, Xiong et al.") if file else None,
        weights_file=file,
    )


VARIANTS = {
    "dofa_small_patch16_224": _spec("dofa_small_patch16_224"),  # no weights of it were published
    "dofa_base_patch16_224": _spec(
        "dofa_base_patch16_224",
        "a027595480a4b0641d0be330d876034439bcb6ead8b9ce10f4949227426856c6",
        445_295_690,
    ),
    "dofa_large_patch16_224": _spec(
        "dofa_large_patch16_224",
        "0ff904d35418b0ae26e15812f2669f906a047f94517823bfbc3824eac9328291",
        1_348_512_262,
    ),
}


def build(variant: str, weights: str, folder: Path, seed: int, seen: InputBands, declared: BackboneSpec):
    """A frozen torch module from (batch, band, y, x) of `seen.input_size` pixels to a Pyramid."""
    import torch
    from terratorch.models.backbones.dofa_vit import resize_pos_embed
    from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY

    from pipeline.backbones.checkpoints import load_strict, read_checkpoint

    class Dofa(torch.nn.Module):
        def __init__(self, wrapper):
            super().__init__()
            self.wrapper = wrapper
            embed = wrapper.dofa_model.patch_embed
            made = embed.forward

            def exact(image, wavelengths):
                # bfloat16 cannot tell wavelengths of neighbouring bands apart.
                with torch.autocast(image.device.type, enabled=False):
                    return made(image.float(), wavelengths)

            embed.forward = exact

        def forward(self, image):
            return from_tokens(self.wrapper(image))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapper = TERRATORCH_BACKBONE_REGISTRY.build(
            variant,
            model_bands=[],  # the wavelengths come from the images, below
            pretrained=False,
            out_indices=list(OUTPUTS[variant]),
            img_size=seen.input_size,
        )
    if None in seen.wavelengths:
        raise UserError("DOFA knows bands by their wavelength, and one of its bands in params.yaml has none.")
    wrapper.wavelengths = list(seen.wavelengths)
    if weights == "pretrained":
        path = Path(folder) / declared.weights_file
        tensors, network = dict(read_checkpoint(path)), wrapper.dofa_model
        if "pos_embed" in tensors and tensors["pos_embed"].shape != network.pos_embed.shape:
            trained, cells = int(tensors["pos_embed"].shape[1] ** 0.5), seen.input_size // 16
            tensors["pos_embed"] = resize_pos_embed(
                tensors["pos_embed"], (cells, cells), (trained, trained), "bicubic"
            )
        # The file is of the masked autoencoder, which has no classifier, nor a normalisation before it.
        load_strict(network, tensors, path, allow_missing=lambda name: name.startswith(("fc_norm.", "head.")))
    return Dofa(wrapper)
