"""GEO-Bench's sets: as written by tests/geobench_files.py, or copies for a test to damage."""

import json
import shutil

import pytest

from pipeline.config import DatasetConfig
from pipeline.data import image_store
from pipeline.data.sources import geobench, validate
from pipeline.data.sources.geobench import download


def dataset_config(name: str, **options) -> DatasetConfig:
    """Configuration of a set with options."""
    return DatasetConfig("geobench", options={"set": name, **options})


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def open_set(tmp_path):
    """Function from the folder of the sets, a set's name and options to the set's samples."""

    def prepare(root, name: str, **options) -> image_store.LazyImageDataset:
        record = geobench.describe_files(geobench.SETS[name], "default", root)
        (tmp_path / "source.json").write_text(json.dumps(record))
        validate(name, dataset_config(name, **options))
        return geobench.prepare(tmp_path, dataset_config(name, **options))

    return prepare


@pytest.fixture
def copy_set(geobench_root, tmp_path):
    """Function from a set's name to the root and the folder of a copy of this set alone."""

    def copy(name: str):
        folder = download.local_folder(geobench.SETS[name], geobench_root)
        root = tmp_path / "copied"
        shutil.copytree(folder, root / folder.relative_to(geobench_root))
        return root, root / folder.relative_to(geobench_root)

    return copy
