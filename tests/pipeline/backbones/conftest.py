"""Real tiles, shared by the tests of the backbones; do not change them in place."""

import pytest

from pipeline.data import image_store


@pytest.fixture(scope="session")
def images(images_path):
    """Tiles of all bands in digital numbers."""
    return image_store.open_images(images_path("sample-landuse-seg"))
