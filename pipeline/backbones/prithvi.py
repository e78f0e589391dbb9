"""Prithvi-EO-2.0 with time and location (Szwarcman et al. 2024, arXiv 2412.02732), built by terratorch.

A vision transformer on six bands of reflectance. With fewer bands the columns of the patch embedding that belong to
those are kept. Only the last of its outputs is normalised, as in terratorch.
"""

from pathlib import Path

from pipeline.backbones.base import BackboneSpec, InputBands, from_tokens
from pipeline.config import HubFile

# terratorch's names of the bands, in the order of the pretrained patch embedding.
BANDS = {
    "blue": "BLUE",
    "green": "GREEN",
    "red": "RED",
    "nir08": "NIR_NARROW",
    "swir16": "SWIR_1",
    "swir22": "SWIR_2",
}
OUTPUTS = {
    "prithvi_eo_v2_tiny_tl": (2, 5, 8, 11),
    "prithvi_eo_v2_100_tl": (2, 5, 8, 11),
    "prithvi_eo_v2_300_tl": (5, 11, 17, 23),
    "prithvi_eo_v2_600_tl": (7, 15, 23, 31),
}


def _spec(variant: str, size_name: str, patch: int, revision: str, sha256: str, size: int) -> BackboneSpec:
    file = f"Prithvi_EO_V2_{size_name}_TL.pt"
    return BackboneSpec(
        bands=tuple(BANDS),
        required=("blue", "green", "red"),
        # Sensors without the narrow near-infrared band: the broad one overlaps it.
        substitutes={"nir08": "nir"},
        input_units="reflectance",
        # terratorch's PRITHVI_V2_MEAN and _STD, which are of reflectance x 10000; a test compares.
        mean=(0.1087, 0.1342, 0.1433, 0.2734, 0.1958, 0.1363),
        std=(0.2248, 0.2179, 0.2178, 0.1850, 0.1242, 0.1049),
        strides=(patch,) * 4,
        layers=tuple(f"blocks.{block}" for block in OUTPUTS[variant]),
        uses_location_and_time=True,
        weights=HubFile(
            f"ibm-nasa-geospatial/Prithvi-EO-2.0-{size_name}-TL",
            file,
            revision,
            sha256,
            size,
            "Apache-2.0, IBM and NASA",
        ),
        weights_file=file,
    )


VARIANTS = {
    "prithvi_eo_v2_tiny_tl": _spec(
        "prithvi_eo_v2_tiny_tl",
        "tiny",
        16,
        "335eadc2c45ad5abe7bd307223e1c48c5b60c41b",
        "d47326db9bad502b611f73e3e3f3a0e68b7b82640d67c22c795417f7209f8d70",
        129_258_736,
    ),
    "prithvi_eo_v2_100_tl": _spec(
        "prithvi_eo_v2_100_tl",
        "100M",
        16,
        "2c84e383194986040f883cc43d7869002c425e1b",
        "d45406d5fc51af1d9657d48f2e2c3ff077408a2e1113f9a242889a4fe4469b17",
        454_660_610,
    ),
    "prithvi_eo_v2_300_tl": _spec(
        "prithvi_eo_v2_300_tl",
        "300M",
        16,
        "63adbd39c271da4c42f447e69b1a7c91a338cdc9",
        "3629cedfbb350faafcb0dac902ae0d3c927e25ce8d9e0024aa1276ec66956ddb",
        1_326_660_716,
    ),
    "prithvi_eo_v2_600_tl": _spec(
        "prithvi_eo_v2_600_tl",
        "600M",
        14,
        "3d72adc6dfc4cc3862bf4f41da8c83db267193c9",
        "7b92c53b0204a76bb775bd8930f045e05776251caa8c83f7367ed0b75b594702",
        2_638_217_218,
    ),
}


def build(variant: str, weights: str, folder: Path, seed: int, seen: InputBands, declared: BackboneSpec):
    """A frozen torch module from (batch, band, y, x) to a Pyramid.

    It takes `place`, (batch, 2) latitude and longitude in degrees, and `time`, (batch, 1, 2) year and day of the year
    from 0, where they are known.
    """
    import torch
    from terratorch.datasets import HLSBands
    from terratorch.models.backbones.prithvi_vit import checkpoint_filter_fn_vit
    from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY

    from pipeline.backbones.checkpoints import load_strict, read_checkpoint, strip_prefix

    class Prithvi(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network
            for name in ("temporal_embed_enc", "location_embed_enc"):
                _in_float32(getattr(network, name))
            network.patch_embed.proj.__class__ = patches()  # a Conv3d with the same weights and names

        def forward(self, image, place=None, time=None):
            return from_tokens(self.network(image, temporal_coords=time, location_coords=place))

    used = [HLSBands[BANDS[slot]] for slot in seen.input_names]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TERRATORCH_BACKBONE_REGISTRY.build(
            variant, pretrained=False, bands=used, num_frames=1, out_indices=list(OUTPUTS[variant])
        )
    if weights == "pretrained":
        path = Path(folder) / declared.weights_file
        tensors = read_checkpoint(path)
        strip_prefix(tensors, "encoder.", path)
        # Drops the decoder, takes the columns of these bands, and keeps the fixed position embedding.
        fitting = checkpoint_filter_fn_vit(tensors, network, [HLSBands[name] for name in BANDS.values()], used)
        load_strict(network, fitting, path)
    return Prithvi(network)


def patches() -> type:
    """A Conv3d whose stride is its kernel, on a GPU by a matrix product: the same numbers, to rounding.

    cuDNN has no fast kernel for all of them: one of 256 images in bfloat16 did not end in half a minute on an H100
    (torch 2.11).
    """
    import torch
    from torch.nn import functional

    class Patches(torch.nn.Conv3d):
        def forward(self, image):
            return self.product(image) if image.is_cuda else super().forward(image)

        def product(self, image):
            """(batch, band, time, y, x) → (batch, channel, time, y, x); a rest at the far edges is left out."""
            for axis, size in enumerate(self.kernel_size, start=2):
                image = image.narrow(axis, 0, image.shape[axis] // size * size)
            for axis, size in reversed(list(enumerate(self.kernel_size, start=2))):
                image = image.unflatten(axis, (-1, size))
            cubes = image.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
            return functional.linear(cubes, self.weight.flatten(1), self.bias).movedim(-1, 1)

    return Patches


def _in_float32(module) -> None:
    """Keep a module out of mixed precision: bfloat16 cannot tell one year, or one day, from the next."""
    import torch

    forward = module.forward

    def exact(*args, **kwargs):
        with torch.autocast(args[0].device.type, enabled=False):
            return forward(*args, **kwargs)

    module.forward = exact
