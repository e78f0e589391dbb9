"""GEO-Bench's sets: as written by tests/geobench_files.py, or copies for a test to damage."""

import collections
import json
import shutil

import pytest

from pipeline.config import DatasetConfig
from pipeline.data import image_store
from pipeline.data.sources import geobench, validate
from pipeline.data.sources.geobench import download


def dataset_config(name: str, **options) -> DatasetConfig:
    return DatasetConfig("geobench", options={"set": name, **options})


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def roots(geobench_root):
    """Folder of the sets by a set's name: of all sets, or of a copy of this set alone."""
    return collections.defaultdict(lambda: geobench_root)


@pytest.fixture
def copy_set(roots, tmp_path):
    """Function that copies a set, for a test to damage, and returns the copy's folder."""

    def copy(name: str):
        folder = download.local_folder(geobench.SETS[name], roots[name])
        copied = tmp_path / "copied" / folder.relative_to(roots[name])
        roots[name] = tmp_path / "copied"
        return shutil.copytree(folder, copied)

    return copy


@pytest.fixture
def open_set(roots, tmp_path):
    """Function from a set's name and options to its samples, in the copy if there is one."""

    def prepare(name: str, **options) -> image_store.LazyImageDataset:
        record = geobench.describe_files(geobench.SETS[name], "default", roots[name])
        (tmp_path / "source.json").write_text(json.dumps(record))
        validate(name, dataset_config(name, **options))
        return geobench.prepare(tmp_path, dataset_config(name, **options))

    return prepare
