"""Real data for every test: the pinned archives, fetched once, and small stores made from them."""

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import config
from pipeline.backbones import create_backbone, efficientnet, get_spec, preprocessing
from pipeline.backbones.encoder import Encoder
from pipeline.data import download, image_store, image_writer
from pipeline.data.sources import get_source, osm_landuse
from tests import geobench_files

ROOT = Path(__file__).parents[1]
# Tests that import terratorch, which takes 10 s, or share extractions made with it: one process runs them.
TERRATORCH = (
    "backbones/test_dofa", "backbones/test_families", "backbones/test_prithvi", "backbones/test_terratorch",
    "datasets/test_geobench_terratorch", "finetune/", "heads/test_upernet", "training/test_neck",
)  # fmt: skip
# They take long: begun last, they would leave the other processes with nothing to do.
LONG = ("cache/test_kills", "pipeline/extraction/test_workers", "stages/test_geobench")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """A group runs in one process: a file, unless more than that share something, and the longest groups first."""
    for item in items:
        file = str(item.path.relative_to(ROOT / "tests"))
        if any(file.startswith(f"pipeline/{name}") for name in TERRATORCH):
            item.add_marker(pytest.mark.xdist_group("terratorch"))
        # What a file's tests share is made once; tests/stages/conftest.py groups those that share its job.
        elif not (item.get_closest_marker("xdist_group") or "job" in getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(file))

    def place(item) -> int:
        marker, file = item.get_closest_marker("xdist_group"), str(item.path.relative_to(ROOT / "tests"))
        shared = marker is None or marker.args == ("job",)  # marked by tests/stages/conftest.py, before or after this
        return 0 if shared else 1 if marker.args == ("terratorch",) else 2 if file.startswith(LONG) else 3

    items.sort(key=place)


@pytest.fixture(autouse=True)
def float32_matmul():
    """Float32 as it is: importing terratorch lets convolutions run in bfloat16 in the whole process."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def gpu() -> str:
    """The device of tests that need a GPU; without one they are skipped.

    Nothing of theirs can be run there: streams, pinned memory and kernels are the device's. The same paths are tested
    on a processor beside each of them; the README says what was last seen on a GPU.
    """
    import torch

    from pipeline.device import resolve_device

    if not torch.cuda.is_available():
        # Where there is one that torch cannot use, and nobody hid it, a skip would hide that.
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        assert hidden or not Path("/dev/nvidiactl").exists(), "there is a GPU, and torch cannot use it"
        pytest.skip(
            "needs a CUDA device: streams, pinned memory and kernels are its own. Last run: README, What was run"
        )
    return resolve_device("cuda")


@pytest.fixture(scope="session")
def params() -> config.Params:
    """The committed params.yaml."""
    return config.load(ROOT / "params.yaml")


@pytest.fixture(scope="session")
def archive_folder() -> Path:
    """Where `make run` keeps archives too, so that nothing is downloaded twice."""
    return ROOT / "data/archives"


@pytest.fixture(scope="session")
def raw_folder(archive_folder, tmp_path_factory):
    """From a source's name to the folder of its unpacked files."""
    folder, made = tmp_path_factory.mktemp("raw"), {}

    def unpack(name: str) -> Path:
        if name not in made:
            archive = get_source(name).ARCHIVE
            (folder / name).mkdir()
            download.unpack(archive, download.fetch(archive, archive_folder), folder / name)
            made[name] = folder / name
        return made[name]

    return unpack


@pytest.fixture(scope="session")
def image_dataset(raw_folder, params):
    """From a dataset's name, and changes to its description, to its images in memory."""
    made = {}

    def prepare(name: str, **changes) -> image_store.ImageDataset:
        key = (name, *sorted(changes.items()))
        if key not in made:
            chosen = dataclasses.replace(params.dataset(name), **changes)
            made[key] = get_source(chosen.source).prepare(raw_folder(chosen.source), chosen)
        return made[key]

    return prepare


@pytest.fixture(scope="session")
def images_path(image_dataset, tmp_path_factory):
    """From a dataset's name to the path of its images store."""
    folder, made = tmp_path_factory.mktemp("images"), {}

    def write(name: str) -> Path:
        if name not in made:
            made[name] = folder / f"{name}.zarr"
            image_writer.write(image_dataset(name), folder / "scratch", made[name])
        return made[name]

    return write


@pytest.fixture(scope="session")
def geobench_root(raw_folder, tmp_path_factory):
    """All twelve sets of GEO-Bench, small, laid out as released."""
    root = tmp_path_factory.mktemp("geobench")
    scene, transform, _ = osm_landuse.read_scene(raw_folder("landuse"))
    mask = osm_landuse.read_mask(raw_folder("landuse"), transform, scene.shape[1:])
    photo = np.asarray(Image.open(next(raw_folder("trees").glob("*crop.png"))).convert("RGB")).transpose(2, 0, 1)
    for name in (*geobench_files.CLASSIFICATION, *geobench_files.SEGMENTATION):
        geobench_files.write(name, root, scene, photo, mask)
    return root


@pytest.fixture
def open_images(tmp_path):
    """From a dataset in memory to its images store, opened."""
    made = iter(range(100))

    def write(one: image_store.ImageDataset):
        path = tmp_path / f"opened-{next(made)}.zarr"
        image_writer.write(one, tmp_path / "opened-scratch", path)
        return image_store.open_images(path)

    return write


@pytest.fixture(scope="session")
def weights_folder(archive_folder, tmp_path_factory):
    """From a stand-in's name to the folder of its unpacked weights."""
    folder, made = tmp_path_factory.mktemp("weights"), {}

    def unpack(variant: str) -> Path:
        if variant not in made:
            archive = efficientnet.VARIANTS[variant].weights
            (folder / variant).mkdir()
            download.unpack(archive, download.fetch(archive, archive_folder), folder / variant)
            made[variant] = folder / variant
        return made[variant]

    return unpack


@pytest.fixture(scope="session")
def make_encoder(tmp_path_factory):
    """From an images store, opened, and a backbone's description to its encoder on this processor.

    Weights are `random` unless a folder of them is given; further keys replace those of the description.
    """
    nothing = tmp_path_factory.mktemp("nothing")

    def make(opened, family: str, variant: str, input_size: int = 64, folder: Path | None = None, **changes):
        given = {"weights": "pretrained" if folder else "random", "input_size": input_size, **changes}
        precision = given.pop("precision", "float32")
        backbone = config.BackboneConfig(family, variant, **given)
        declared = get_spec(backbone)
        seen = preprocessing.make_preprocessor(opened, variant, backbone, declared)
        network = create_backbone(backbone, declared, seen.input_bands, folder or nothing)
        return Encoder(seen, network, "cpu", precision, strides=declared.strides)

    return make
