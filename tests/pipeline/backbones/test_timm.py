import numpy as np
import pytest
import timm
import torch

from pipeline.config import HubFile
from pipeline.data import image_store
from pipeline.errors import UserError


@pytest.fixture
def images(images_path):
    return image_store.open_images(images_path("sample-trees"))


@pytest.mark.parametrize(("variant", "width"), [("resnet18", 512), ("vit_tiny_patch16_224", 192)])
def test_a_pyramid_of_any_network_with_its_own_normalisation(variant, width, images, make_encoder):
    sealed = make_encoder(images, "timm", variant, 64)
    image = images.image[:2].values
    pyramid = sealed(image)
    assert len(pyramid.levels) == 4
    assert pyramid.levels[-1].shape[:2] == (2, width)
    cfg = timm.get_pretrained_cfg(variant)
    expected = (image / 255 - np.reshape(cfg.mean, (3, 1, 1))) / np.reshape(cfg.std, (3, 1, 1))
    np.testing.assert_allclose(sealed.prepare(image), expected, atol=1e-5)


def test_weights_of_timms_own_layout(images, make_encoder, tmp_path):
    torch.manual_seed(3)
    theirs = timm.create_model("resnet18").eval()
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    hub = HubFile("timm/x", "model.pt", "0" * 40)
    sealed = make_encoder(images, "timm", "resnet18", 64, tmp_path, hub=hub)
    image = images.image[:2].values
    with torch.inference_mode():
        expected = theirs.forward_features(sealed.prepare(image))
    np.testing.assert_allclose(sealed(image).levels[3], expected, rtol=1e-4, atol=1e-4)
    torch.save({"fc.bias": torch.zeros(1000)}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="does not fit the network: missing conv1.weight"):
        make_encoder(images, "timm", "resnet18", 64, tmp_path, hub=hub)


def test_more_bands_than_three_are_standardised(images_path, make_encoder):
    landuse = image_store.open_images(images_path("sample-landuse"))
    sealed = make_encoder(
        landuse, "timm", "resnet18", 64, bands=("red", "nir", "B11", 0.49), input_units="reflectance",
        normalisation="dataset",
    )  # fmt: skip
    assert sealed.prepare(landuse.image[:1].values).shape == (1, 4, 64, 64)
    assert sealed(landuse.image[:1].values).levels[0].shape[1] == 64
