"""SAM 2.1's image encoder: the Hiera trunk (Ryali et al. 2023, Ravi et al. 2024), built by the package sam2.

A hierarchical network: four levels of strides 4 to 32. It was trained on photographs of 1024 px, and gains from
larger inputs than 224. The neck behind the trunk drops the coarsest level, so the trunk is taken.
"""

from collections.abc import Mapping
from pathlib import Path

from pipeline.backbones.base import BackboneSpec, InputBands, from_maps
from pipeline.config import HubFile

_PREFIX = "image_encoder.trunk."


def _spec(name: str, revision: str, sha256: str, size: int) -> BackboneSpec:
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
        weights_file=file,
    )


VARIANTS = {
    "sam2.1_hiera_t": _spec(
        "tiny",
        "de431c4043854a71d8101e17995dfe596bf101a5",
        "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
        156_008_466,
    ),
    "sam2.1_hiera_s": _spec(
        "small",
        "ee5bba1d82bb8749febdf90f45e84b687142ba03",
        "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
        184_416_285,
    ),
    "sam2.1_hiera_b+": _spec(
        "base-plus",
        "b7320756a13354e7530a63935656d35b2f91a290",
        "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
        323_606_802,
    ),
    "sam2.1_hiera_l": _spec(
        "large",
        "665f8e2ad61cf5f53d65644ff27c8ee525124610",
        "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
        898_083_611,
    ),
}


def build(variant: str, weights: str, folder: Path, seed: int, seen: InputBands, declared: BackboneSpec):
    """A frozen torch module from (batch, 3, y, x), sides multiples of 32, to a Pyramid."""
    import sam2
    import torch
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from pipeline.backbones.checkpoints import load_strict, read_checkpoint, strip_prefix

    class Trunk(torch.nn.Module):
        def __init__(self, trunk):
            super().__init__()
            self.trunk = trunk

        def forward(self, image):
            return from_maps(self.trunk(image))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        described = OmegaConf.load(Path(sam2.__file__).parent / f"configs/sam2.1/{variant}.yaml")
        trunk = instantiate(described.model.image_encoder.trunk)
    if weights == "pretrained":
        path = Path(folder) / declared.weights_file
        held = read_checkpoint(path)
        inner = held.get("model")
        load_strict(trunk, strip_prefix(inner if isinstance(inner, Mapping) else held, _PREFIX, path), path)
    return Trunk(trunk)
