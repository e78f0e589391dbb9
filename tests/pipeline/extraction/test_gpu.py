"""The engine on a GPU: the processor's features, the same bytes each time, and what mixed precision changes."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cache.reader import FeatureStore
from pipeline.backbones.encoder import Encoder
from pipeline.config import BackboneConfig, ComputeConfig, ExtractConfig
from pipeline.data import image_store
from pipeline.errors import UserError
from pipeline.extraction import batch_size, launch

EXTRACT = ExtractConfig(
    dtype="float32", codec="none", precision="float32", compiled=False, batch=10, shard=16, keep_levels=False,
    views=("identity",),
)  # fmt: skip
LITE0 = BackboneConfig("efficientnet", "lite0", "random", 64)


@pytest.fixture
def run(gpu, images_path, tmp_path):
    """Extract tiles with an untrained network; returns the store and what it says of itself."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/source.json").write_text(json.dumps({"weights": "random"}))

    def extract(name: str, device: str = gpu, backbone: BackboneConfig = LITE0, processes: int = 0, **changes):
        task = launch.ExtractionJob(
            "lite0", backbone, dataclasses.replace(EXTRACT, **changes), device,
            images=images_path("sample-landuse-seg"), weights=tmp_path / "weights",
            scratch=tmp_path / name / "scratch", final=tmp_path / name / "store.zarr",
        )  # fmt: skip
        said = launch.launch(task, ComputeConfig(device, processes, ""))
        return FeatureStore(task.final), said

    return extract


def levels(features: FeatureStore) -> dict[str, np.ndarray]:
    rows = np.arange(len(features.sample))
    names = [f"{level}/features" for level in features.levels] + [f"pooled/{name}" for name in features.pooled]
    return {name: features.read(name, rows).astype(np.float64) for name in names}


def apart(one: FeatureStore, other: FeatureStore) -> float:
    """The largest relative root mean square difference of an array."""
    pairs = zip(levels(one).values(), levels(other).values(), strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in pairs)


def test_a_gpu_gives_the_processors_features(run):
    assert apart(run("cpu", "cpu")[0], run("gpu")[0]) < 1e-4


@pytest.mark.parametrize(("precision", "most"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_mixed_precision_differs_by_what_it_says(run, precision, most):
    exact, (lower, said) = run("exact")[0], run("lower", precision=precision)
    assert 1e-5 < apart(exact, lower) < most
    assert all(0 < error < most for error in said["precision_error"].values())


def test_the_same_bytes_each_time(run):
    assert run("once")[1]["content_sha256"] == run("again")[1]["content_sha256"]


def test_two_processes_give_what_one_gives(run):
    """Not to the byte: cuDNN may choose other kernels in another process."""
    assert apart(run("once")[0], run("beside", processes=2)[0]) < 1e-5


def test_a_batch_is_found(run):
    found, given = run("found", batch=0, shard=32)[0], run("given", batch=32, shard=32)[0]
    assert apart(given, found) < 1e-4


def test_less_memory_gives_a_smaller_batch(gpu, images_path, make_encoder, monkeypatch):
    opened = image_store.open_images(images_path("sample-landuse-seg"))
    made = make_encoder(opened, "efficientnet", "lite0", 64)
    with pytest.raises(UserError, match="The network does not take"):
        batch_size.find_batch_size(opened, Encoder(made.inputs, torch.nn.Conv2d(7, 3, 1), gpu), 64)
    sealed = Encoder(made.inputs, made.network, gpu, strides=made.strides)
    assert batch_size.find_batch_size(opened, sealed, 64) == 64
    each = batch_size._bytes_of(opened, sealed, 8, 1) / 8
    scarce = SimpleNamespace(total_memory=torch.cuda.memory_allocated(gpu) + 20 * each / batch_size._SHARE)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: scarce)
    assert 8 <= batch_size.find_batch_size(opened, sealed, 64) <= 16
    assert batch_size.find_batch_size(opened, sealed, 64, views=4) < 8


def test_a_compiled_network_gives_the_same_features(run):
    assert apart(run("plain")[0], run("compiled", compiled=True)[0]) < 1e-3


@pytest.mark.parametrize(
    ("family", "variant"),
    [("hiera", "sam2.1_hiera_t"), ("prithvi", "prithvi_eo_v2_tiny_tl"), ("dofa", "dofa_small_patch16_224")],
)
def test_the_foundation_models_small_kin(run, family, variant):
    backbone = BackboneConfig(family, variant, "random", 224, normalisation="dataset")
    exact = run("cpu", "cpu", backbone)[0]
    assert apart(exact, run("gpu", backbone=backbone)[0]) < 1e-3
    assert apart(exact, run("lower", backbone=backbone, precision="bfloat16")[0]) < 0.05
