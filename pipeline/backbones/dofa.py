"""DOFA (Xiong et al. 2024, arXiv 2403.15356), built by terratorch from torchgeo's network.

A vision transformer whose patch embedding is computed from the wavelengths of the bands. It takes any bands in any
order, with their wavelengths; catalog.yaml has those of pretraining. Its outputs are not normalised. It has no
normalisation of its inputs: standardize them with the dataset's statistics.
"""

from pathlib import Path

import torch
from terratorch.models.backbones.dofa_vit import resize_pos_embed
from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY
from torchgeo.models.dofa import position_embedding

from pipeline.backbones.base import BackboneSpec, InputBands
from pipeline.backbones.checkpoints import load_strict, read_checkpoint
from pipeline.backbones.encoder import PyramidNetwork, compute_in_float32
from pipeline.config import BackboneConfig
from pipeline.errors import UserError

PATCH_SIZE = 16


def sin_cos_positions(side: int, n_channels: int) -> torch.Tensor:
    """Return the fixed position embedding of pretraining, float32 (side * side, channel).

    Half of the channels are of the column, half of the row; a class token's are 0. torchgeo leaves zeros, since
    checkpoints contain it. Source: pretraining/util/pos_embed.py of github.com/zhu-xlab/DOFA.
    """
    rows, columns = torch.meshgrid(*[torch.arange(side, dtype=torch.float32)] * 2, indexing="ij")
    return torch.cat([position_embedding(n_channels // 2, axis) for axis in (columns, rows)], dim=1)


def create_network(
    backbone: BackboneConfig, spec: BackboneSpec, input_bands: InputBands, weights_dir: Path
) -> PyramidNetwork:
    """Build the network for one size of images; UserError for a band without a wavelength."""
    if None in input_bands.wavelengths:
        name = input_bands.input_names[input_bands.wavelengths.index(None)]
        raise UserError(
            f"DOFA needs the wavelength of every band, and '{name}' has none. State it in the dataset's bands, or "
            "choose other bands for the backbone in params.yaml.",
            key="bands", value=name,
        )  # fmt: skip
    wrapper = TERRATORCH_BACKBONE_REGISTRY.build(
        backbone.variant, model_bands=[], pretrained=False, out_indices=list(spec.layer_indices),
        img_size=input_bands.input_size,
    )  # fmt: skip
    wrapper.wavelengths, network = list(input_bands.wavelengths), wrapper.dofa_model
    if backbone.weights == "pretrained":
        path = weights_dir / spec.weights_file
        tensors = dict(read_checkpoint(path))
        if "pos_embed" in tensors and tensors["pos_embed"].shape != network.pos_embed.shape:
            pretrained_side, side = int(tensors["pos_embed"].shape[1] ** 0.5), input_bands.input_size // PATCH_SIZE
            tensors["pos_embed"] = resize_pos_embed(
                tensors["pos_embed"], (side, side), (pretrained_side, pretrained_side), "bicubic"
            )
        # The file is of the masked autoencoder, which has neither the classifier nor the normalisation before it.
        load_strict(network, tensors, path, allow_missing=lambda name: name.startswith(("fc_norm.", "head.")))
    else:
        network.pos_embed[0, 1:] = sin_cos_positions(input_bands.input_size // PATCH_SIZE, network.embed_dim)
    compute_in_float32(network.patch_embed)  # its wavelengths
    return PyramidNetwork(wrapper)
