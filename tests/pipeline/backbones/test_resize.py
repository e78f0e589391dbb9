import pytest
import torch
from torch.nn import functional

from pipeline.backbones.resize import bilinear


@pytest.mark.parametrize(("height", "width", "side"), [
    (256, 256, 224), (128, 128, 224), (16, 16, 224), (64, 64, 65), (97, 97, 31), (300, 300, 32), (224, 224, 224),
    (40, 70, 50), (1, 1, 8), (9, 9, 1),
])  # fmt: skip
def test_it_is_torchs_own_resize(height, width, side):
    values = torch.rand(3, 2, height, width, generator=torch.Generator().manual_seed(0))
    theirs = functional.interpolate(values.double(), size=(side, side), mode="bilinear", antialias=True)
    assert bilinear(values, side).dtype == torch.float32
    torch.testing.assert_close(bilinear(values, side).double(), theirs, rtol=0, atol=1e-6)


def test_an_image_is_resized_alike_in_any_batch():
    values = torch.rand(9, 3, 60, 60, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bilinear(values, 50)[4:5], bilinear(values[4:5], 50), rtol=0, atol=1e-6)
