import numpy as np
import pytest
import timm
import torch

from pipeline.config import HubFile
from pipeline.data import image_store
from pipeline.errors import UserError
from tests.errors import raises


@pytest.mark.parametrize(("variant", "channels"), [("resnet18", 512), ("vit_tiny_patch16_224", 192)])
def test_timm_network_gives_a_pyramid_with_its_own_normalisation(variant, channels, images_path, make_encoder):
    images = image_store.open_images(images_path("sample-trees"))
    encoder = make_encoder(images, "timm", variant, 64)
    image = images.image[:2].values
    pyramid = encoder(image)
    assert len(pyramid.levels) == 4
    assert pyramid.levels[-1].shape[:2] == (2, channels)
    pretrained = timm.get_pretrained_cfg(variant)
    mean, std = np.reshape(pretrained.mean, (3, 1, 1)), np.reshape(pretrained.std, (3, 1, 1))
    np.testing.assert_allclose(encoder.prepare(image), (image / 255 - mean) / std, atol=1e-5)


def test_timm_weights_have_timms_layout(images, make_encoder, tmp_path):
    torch.manual_seed(3)
    official = timm.create_model("resnet18").eval()
    torch.save(official.state_dict(), tmp_path / "model.pt")
    hub = HubFile("timm/x", "model.pt", "0" * 40)
    encoder = make_encoder(images, "timm", "resnet18", 64, tmp_path, hub=hub)
    image = images.image[:2].values
    with torch.inference_mode():
        expected = official.forward_features(encoder.prepare(image))
    np.testing.assert_allclose(encoder(image).levels[3], expected, rtol=1e-4, atol=1e-4)
    torch.save({"fc.bias": torch.zeros(1000)}, tmp_path / "model.pt")
    with raises(UserError, "conv1.weight", path=tmp_path / "model.pt"):
        make_encoder(images, "timm", "resnet18", 64, tmp_path, hub=hub)


def test_timm_network_on_four_bands_uses_the_datasets_statistics(images, make_encoder):
    encoder = make_encoder(
        images, "timm", "resnet18", 64, bands=("red", "nir", "B11", 0.49), input_units="reflectance",
        normalisation="dataset",
    )  # fmt: skip
    assert encoder.prepare(images.image[:1].values).shape == (1, 4, 64, 64)
    assert encoder(images.image[:1].values).levels[0].shape[1] == 64
