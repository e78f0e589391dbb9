import numpy as np
import pytest
import torch

from pipeline.backbones.encoder import Encoder
from pipeline.data import image_store
from pipeline.errors import UserError
from tests.errors import raises


@pytest.fixture
def images(images_path):
    return image_store.open_images(images_path("sample-landuse"))


@pytest.fixture
def encoder(images, make_encoder, weights_folder):
    return make_encoder(images, "efficientnet", "lite0", 64, weights_folder("lite0"))


def test_encoder_features_do_not_depend_on_the_batch_even_after_terratorch_lowers_the_precision(encoder, images):
    torch.set_float32_matmul_precision("medium")  # as importing terratorch does
    together = encoder(images.image[:5].values).pooled["mean_level3"]
    alone = np.concatenate([encoder(images.image[i : i + 1].values).pooled["mean_level3"] for i in range(5)])
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_encoder_in_bfloat16_differs_from_float32_by_rounding(encoder, images):
    lower = Encoder(encoder.preprocessor, encoder.network, "cpu", precision="bfloat16")
    exact, rounded = (each_encoder(images.image[:3].values).levels[2] for each_encoder in (encoder, lower))
    assert rounded.dtype == np.float32
    assert 0 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.2  # eight bits of mantissa


def test_encoder_compiled_compiles_the_network(encoder, images, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    compiled_encoder = Encoder(encoder.preprocessor, encoder.network, "cpu", compiled=True)
    image = images.image[:2].values
    np.testing.assert_array_equal(compiled_encoder(image).levels[1], encoder(image).levels[1])
    assert compiled == [encoder.network]


def test_encoder_refuses_shapes_that_the_spec_does_not_state(encoder, images):
    other = Encoder(encoder.preprocessor, encoder.network, "cpu", strides=(4, 8, 16, 16))
    with raises(UserError, "(1, 320, 2, 2)", 64, "4x4", key="strides", value=(1, 320, 2, 2)):
        other(images.image[:1].values)
