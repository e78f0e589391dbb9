"""Real tiles and an untrained network for the tests of the engine."""

import pytest

from pipeline.data import image_store


@pytest.fixture(scope="session")
def images(images_path):
    """40 real tiles whose store states eight images per file."""
    images = image_store.open_images(images_path("sample-landuse-seg")).isel(sample=slice(0, 40))
    images.image.encoding["preferred_chunks"] = {"sample": 8}
    return images


@pytest.fixture(scope="session")
def encoder(images, make_encoder):
    return make_encoder(images, "efficientnet", "lite0", 32)


@pytest.fixture(scope="session")
def pyramid(images, encoder):
    return encoder(images.image[:1].values)
