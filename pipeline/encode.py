"""The one sealed way from stored images to features: bands → units → normalise → resize → backbone → check.

Nothing else may call a backbone, so that no step can be forgotten or done twice.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.nn import functional

from pipeline.bands import select, to_unit_scale
from pipeline.errors import UserError
from pipeline.pyramid import Pyramid, Spec


class Encoder:
    """Encodes batches of one dataset's images with one frozen backbone.

    Args:
        spec: the backbone's declaration.
        network: its torch module, on `device`.
        bands: common names of the images' bands, in their order.
        attributes: the images store's, for units and display stretch.
        input_size: side in pixels to which images are resized.
    """

    def __init__(self, spec: Spec, network, bands: Sequence[str], attributes: Mapping, input_size: int, device: str):
        self.spec, self.device, self.input_size = spec, device, input_size
        # Channels last is no slower on a CPU (benchmarks/choices.py), and what GPUs want in low precision.
        self.network = network.to(device, memory_format=torch.channels_last)
        self.positions = select(spec.bands or bands, bands)
        self.units, self.display = attributes["units"], attributes.get("display")
        check_units(spec, self.units, self.display)

    def prepare(self, image: np.ndarray):
        """The exact tensor that reaches the network: float32 (batch, band, input_size, input_size).

        Args:
            image: (batch, band, y, x) in the store's units.
        """
        values = to_unit_scale(image[:, self.positions], self.units)
        if self.spec.eats == "display" and self.units != "uint8":
            low, high = self.display
            values = np.clip((values - low) / (high - low), 0, 1)
        if self.spec.mean is not None:
            mean = np.array(self.spec.mean, dtype=np.float32)[:, None, None]
            std = np.array(self.spec.std, dtype=np.float32)[:, None, None]
            values = (values - mean) / std
        batch = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        batch = batch.to(self.device, memory_format=torch.channels_last)
        size = (self.input_size, self.input_size)
        if batch.shape[-2:] == size:
            return batch
        if self.spec.resize == "nearest":
            return functional.interpolate(batch, size=size, mode="nearest-exact")
        return functional.interpolate(batch, size=size, mode="bilinear", antialias=True)

    def __call__(self, image: np.ndarray) -> Pyramid:
        """Features of a batch, as float32 numpy arrays.

        Raises:
            UserError: the backbone gave other shapes than it declares.
        """
        # Importing terratorch 1.2 sets this to "medium" for the whole process, which makes float32
        # convolutions run in bfloat16 on CPUs that can, with errors of some percent.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False  # torch lets GPUs convolve float32 with ten bits of mantissa
        with torch.inference_mode():
            pyramid = self.network(self.prepare(image))
        for level, stride in zip(pyramid.levels, self.spec.strides, strict=True):
            cells = self.input_size // stride
            if tuple(level.shape[-2:]) != (cells, cells):
                raise UserError(
                    f"A level of stride {stride} has shape {tuple(level.shape)} for an input of "
                    f"{self.input_size} px; {cells}x{cells} cells were declared."
                )
        return Pyramid(
            [level.float().cpu().numpy() for level in pyramid.levels],
            {name: vector.float().cpu().numpy() for name, vector in pyramid.pooled.items()},
        )


def check_units(spec: Spec, units: str, display: Sequence[float] | None) -> None:
    """Refuse units that the backbone was not made for; they are declared, never guessed.

    Raises:
        UserError: photographs for a model of reflectances, or reflectances without a declared stretch for a
            model of photographs.
    """
    if spec.eats == "reflectance" and units == "uint8":
        raise UserError(
            "This backbone wants reflectance, and the images are 8-bit photographs. Choose another backbone."
        )
    if spec.eats == "display" and units != "uint8" and not display:
        raise UserError(
            f"This backbone wants a picture, and the images are in '{units}' without a declared stretch. "
            "Declare 'display' (the reflectances shown as black and white) in the dataset's source."
        )
