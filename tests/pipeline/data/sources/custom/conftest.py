"""Datasets that several tests only read, and a folder to change."""

import shutil

import pytest

from tests.pipeline.data.sources.custom import custom_data


@pytest.fixture(scope="package")
def tiles(raw_folder, tmp_path_factory):
    """Folder of 48 tiles of the land use scene in `images`, and of their masks in `masks`."""
    folder = tmp_path_factory.mktemp("tiles")
    corners = [(row, column) for row in range(0, 768, 128) for column in range(0, 1024, 128)]
    custom_data.write_windows(raw_folder, folder, corners, "images", "masks")
    return folder


@pytest.fixture
def folder(tiles, tmp_path):
    """Copy of the tiles and masks, to be changed."""
    return shutil.copytree(tiles, tmp_path / "tiles")


@pytest.fixture(scope="package")
def prepared_scene(raw_folder, tmp_path_factory):
    return custom_data.prepare(custom_data.scene_dataset(raw_folder), tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="package")
def prepared_tiles(tiles, tmp_path_factory):
    return custom_data.prepare(custom_data.tile_dataset(tiles), tmp_path_factory.mktemp("prepared"))
