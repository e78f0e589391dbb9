"""A vision transformer's first layer on a GPU: cubes of an image that do not overlap, by a matrix product."""

import torch
from torch.nn import functional


class Patches(torch.nn.Conv3d):
    """A Conv3d whose stride is its kernel: the same numbers, to rounding.

    cuDNN has no fast kernel for all of them: one of 256 images in bfloat16 did not end in half a minute on an H100
    (torch 2.11).
    """

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(batch, band, time, y, x) → (batch, channel, time, y, x)."""
        return self.product(image) if image.is_cuda else super().forward(image)

    def product(self, image: torch.Tensor) -> torch.Tensor:
        """The same on any device; what is left over at the far edges is ignored, as a Conv3d does."""
        for axis, size in enumerate(self.kernel_size, start=2):
            image = image.narrow(axis, 0, image.shape[axis] // size * size)
        for axis, size in reversed(list(enumerate(self.kernel_size, start=2))):
            image = image.unflatten(axis, (-1, size))
        cubes = image.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
        return functional.linear(cubes, self.weight.flatten(1), self.bias).movedim(-1, 1)
