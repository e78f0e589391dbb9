"""Prithvi-EO-2.0 with location and time, built by terratorch.

Szwarcman et al. 2024, arXiv 2412.02732. A vision transformer on six bands of reflectance. With fewer bands, the
columns of the patch embedding that belong to them are used. Only the last of its outputs is normalised, as in
terratorch.
"""

from pathlib import Path

import torch
from terratorch.datasets import HLSBands
from terratorch.models.backbones.prithvi_vit import checkpoint_filter_fn_vit
from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY
from torch.nn import functional

from pipeline.backbones.base import BackboneSpec, InputBands
from pipeline.backbones.checkpoints import load_strict, read_checkpoint, strip_prefix
from pipeline.backbones.encoder import PyramidNetwork, compute_in_float32
from pipeline.config import BackboneConfig

# terratorch's names of the bands.
HLS_BANDS = {
    "blue": HLSBands.BLUE, "green": HLSBands.GREEN, "red": HLSBands.RED, "nir08": HLSBands.NIR_NARROW,
    "swir16": HLSBands.SWIR_1, "swir22": HLSBands.SWIR_2,
}  # fmt: skip


class PatchConv3d(torch.nn.Conv3d):
    """A Conv3d whose stride equals its kernel; on a GPU it is a matrix product.

    The results differ by rounding only. cuDNN has no fast kernel for some sizes: one forward pass of 256 images in
    bfloat16 took more than half a minute on an H100 (torch 2.11).
    """

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.as_matrix_product(image) if image.is_cuda else super().forward(image)

    def as_matrix_product(self, image: torch.Tensor) -> torch.Tensor:
        """Map (batch, band, time, y, x) to (batch, channel, time, y, x), without incomplete patches."""
        for axis, size in enumerate(self.kernel_size, start=2):
            image = image.narrow(axis, 0, image.shape[axis] // size * size)
        for axis, size in reversed(list(enumerate(self.kernel_size, start=2))):
            image = image.unflatten(axis, (-1, size))
        patches = image.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
        return functional.linear(patches, self.weight.flatten(1), self.bias).movedim(-1, 1)


def create_network(
    backbone: BackboneConfig, spec: BackboneSpec, input_bands: InputBands, weights_dir: Path
) -> PyramidNetwork:
    bands = [HLS_BANDS[input_name] for input_name in input_bands.input_names]
    network = TERRATORCH_BACKBONE_REGISTRY.build(
        backbone.variant, pretrained=False, bands=bands, num_frames=1, out_indices=list(spec.layer_indices)
    )
    if backbone.weights == "pretrained":
        path = weights_dir / spec.weights_file
        tensors = read_checkpoint(path)
        strip_prefix(tensors, "encoder.", path)  # checks that it is a Prithvi checkpoint; the filter strips, too
        # Drops the decoder, selects the columns of these bands, and keeps the fixed position embedding.
        pretrained_bands = [HLS_BANDS[band] for band in spec.bands]
        load_strict(network, checkpoint_filter_fn_vit(tensors, network, pretrained_bands, bands), path)
    compute_in_float32(network.temporal_embed_enc)  # the year and the day
    compute_in_float32(network.location_embed_enc)
    network.patch_embed.proj.__class__ = PatchConv3d  # keeps the weights and their names
    return PyramidNetwork(network, _forward)


def _forward(network: torch.nn.Module, image: torch.Tensor, location=None, time=None) -> list[torch.Tensor]:
    return network(image, temporal_coords=time, location_coords=location)
