"""GEO-Bench's sets in files, whole or copied to be damaged, and their streams."""

import json
import shutil

import pytest

from pipeline.config import DatasetConfig
from pipeline.data import image_store
from pipeline.data.sources import geobench, validate
from pipeline.data.sources.geobench import download


def block(name: str, **options) -> DatasetConfig:
    return DatasetConfig("geobench", options={"set": name, **options})


@pytest.fixture
def stream(tmp_path):
    """From a folder of sets, and options, to the set's stream."""

    def make(root, name: str, **options) -> image_store.LazyImageDataset:
        declared = geobench.SETS[name]
        record = geobench.describe_files(declared, "default", root)
        (tmp_path / "source.json").write_text(json.dumps(record))
        validate(name, block(name, **options))
        return geobench.prepare(tmp_path, block(name, **options))

    return make


@pytest.fixture
def copied(geobench_root, tmp_path):
    """From a set's name to a root with a copy of it alone, and its folder."""

    def copy(name: str):
        folder = download.local_folder(geobench.SETS[name], geobench_root)
        root = tmp_path / "copied"
        shutil.copytree(folder, root / folder.relative_to(geobench_root))
        return root, root / folder.relative_to(geobench_root)

    return copy
