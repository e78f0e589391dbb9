"""The engine on a GPU: the CPU's features, reproducible bytes, and the effect of mixed precision."""

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
from pipeline.extraction import estimate, launch
from tests.errors import raises

EXTRACT = ExtractConfig(
    dtype="float32", codec="none", precision="float32", compiled=False, batch=10, shard=16, keep_levels=False,
    views=("identity",),
)  # fmt: skip
LITE0 = BackboneConfig("efficientnet", "lite0", "random", 64)


@pytest.fixture
def extract(gpu, images_path, tmp_path):
    """Function that extracts the images with an untrained network; returns the store and its attributes."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/source.json").write_text(json.dumps({"weights": "random"}))

    def run(name: str, device: str = gpu, backbone: BackboneConfig = LITE0, n_processes: int = 0, **changes):
        job = launch.ExtractionJob(
            "lite0", backbone, dataclasses.replace(EXTRACT, **changes), device,
            images_path=images_path("sample-landuse-seg"), weights_dir=tmp_path / "weights",
            scratch=tmp_path / name / "scratch", final=tmp_path / name / "store.zarr",
        )  # fmt: skip
        attributes = launch.launch(job, ComputeConfig(device, n_processes, ""))
        return FeatureStore(job.final), attributes

    return run


def relative_difference(expected: FeatureStore, actual: FeatureStore) -> float:
    """Return the largest relative root mean square difference of an array."""
    names, rows = [*expected.level_arrays, *expected.pooled_arrays], np.arange(len(expected.sample))
    pairs = [[store.read(name, rows).astype(np.float64) for store in (expected, actual)] for name in names]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in pairs)


@pytest.mark.parametrize(("precision", "maximum"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_gpu_mixed_precision_differs_by_the_recorded_error(extract, precision, maximum):
    exact, (lower, attributes) = extract("exact")[0], extract("lower", precision=precision)
    assert 1e-5 < relative_difference(exact, lower) < maximum
    assert all(0 < error < maximum for error in attributes["precision_error"].values())


def test_gpu_extraction_repeats_its_bytes_and_gives_the_same_features_in_two_processes_or_compiled(extract):
    first, attributes = extract("first")
    assert attributes["content_sha256"] == extract("second")[1]["content_sha256"]
    # Not the same bytes: cuDNN may choose other kernels in another process.
    assert relative_difference(first, extract("shared", n_processes=2)[0]) < 1e-5
    assert relative_difference(first, extract("compiled", compiled=True)[0]) < 1e-3


def test_find_batch_size_with_less_gpu_memory_is_smaller(gpu, images_path, make_encoder, monkeypatch):
    images = image_store.open_images(images_path("sample-landuse-seg"))
    cpu_encoder = make_encoder(images, "efficientnet", "lite0", 64)
    with raises(UserError, key="bands"):
        other = Encoder(cpu_encoder.preprocessor, torch.nn.Conv2d(7, 3, 1), gpu)
        estimate.find_batch_size(images, other, 64)
    encoder = Encoder(cpu_encoder.preprocessor, cpu_encoder.network, gpu, strides=cpu_encoder.strides)
    assert estimate.find_batch_size(images, encoder, 64) == 64
    bytes_per_image = estimate._forward_bytes(images, encoder, 8, 1) / 8
    budget = 20 * bytes_per_image / estimate._GPU_MEMORY_FRACTION
    properties = SimpleNamespace(total_memory=torch.cuda.memory_allocated(gpu) + budget)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert 8 <= estimate.find_batch_size(images, encoder, 64) <= 16
    assert estimate.find_batch_size(images, encoder, 64, n_views=4) < 8


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("efficientnet", "lite0"), ("hiera", "sam2.1_hiera_t"), ("prithvi", "prithvi_eo_v2_tiny_tl"),
        ("dofa", "dofa_small_patch16_224"),
    ],
)  # fmt: skip
def test_gpu_features_equal_the_cpus(extract, family, variant):
    backbone = BackboneConfig(family, variant, "random", 224, normalisation="dataset")
    exact = extract("cpu", "cpu", backbone)[0]
    maximum = 1e-4 if family == "efficientnet" else 1e-3
    assert relative_difference(exact, extract("gpu", backbone=backbone)[0]) < maximum
    assert relative_difference(exact, extract("lower", backbone=backbone, precision="bfloat16")[0]) < 0.05
