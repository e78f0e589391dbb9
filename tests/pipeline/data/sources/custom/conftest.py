"""Datasets that several tests only read."""

import pytest

from pipeline.data.sources.custom import samples
from tests.pipeline.data.sources.custom.custom_data import prepare, scene_dataset, tile_dataset


@pytest.fixture(scope="package", autouse=True)
def few_draws():
    """Try 200 random assignments of blocks to splits: 20,000 take a second for each dataset."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(samples, "MAX_DRAWS", samples.MIN_DRAWS)
        yield


@pytest.fixture(scope="package")
def prepared_scene(few_draws, raw_folder, tmp_path_factory):
    """The scene with 13 files and polygons."""
    return prepare(scene_dataset(raw_folder), tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="package")
def prepared_tiles(few_draws, tiles, tmp_path_factory):
    """The tiles with masks."""
    return prepare(tile_dataset(tiles), tmp_path_factory.mktemp("prepared"))
