import dataclasses

import numpy as np
import pytest
import torch

from pipeline.backbones.encoder import Encoder
from pipeline.data import image_store
from pipeline.errors import UserError


@pytest.fixture
def sealed(images_path, make_encoder, weights_folder):
    opened = image_store.open_images(images_path("sample-landuse"))
    return make_encoder(opened, "efficientnet", "lite0", 64, weights_folder("lite0")), opened


def test_batches_do_not_matter_even_after_terratorch_lowered_the_precision(sealed):
    encoder, opened = sealed
    torch.set_float32_matmul_precision("medium")  # as importing terratorch does
    together = encoder(opened.image[:5].values).pooled["mean_level3"]
    alone = np.concatenate([encoder(opened.image[i : i + 1].values).pooled["mean_level3"] for i in range(5)])
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_lower_precision_is_another_forward_but_a_near_one(sealed):
    encoder, opened = sealed
    lower = Encoder(encoder.inputs, encoder.network, "cpu", precision="bfloat16")
    exact, near = (one(opened.image[:3].values).levels[2] for one in (encoder, lower))
    assert near.dtype == np.float32
    assert 0 < np.linalg.norm(near - exact) / np.linalg.norm(exact) < 0.2  # eight bits of mantissa


def test_a_compiled_forward_gives_the_same(sealed, monkeypatch):
    encoder, opened = sealed
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    again = Encoder(encoder.inputs, encoder.network, "cpu", compiled=True)
    image = opened.image[:2].values
    np.testing.assert_array_equal(again(image).levels[1], encoder(image).levels[1])
    assert compiled == [encoder.network]


def test_shapes_that_were_not_declared_are_refused(sealed):
    encoder, opened = sealed
    wrong = Encoder(encoder.inputs, encoder.network, "cpu", strides=(4, 8, 16, 16))
    with pytest.raises(UserError, match=r"shape \(1, 320, 2, 2\) for an input of 64 px; 4x4 cells were declared"):
        wrong(opened.image[:1].values)
    assert dataclasses.is_dataclass(encoder.inputs)
