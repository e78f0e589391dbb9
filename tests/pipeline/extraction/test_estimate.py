import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from cache.writer import Writer
from pipeline.backbones import get_spec
from pipeline.backbones.encoder import Encoder
from pipeline.config import BackboneConfig, ExtractConfig
from pipeline.errors import UserError
from pipeline.extraction import engine, estimate
from tests.errors import raises

SPEC = get_spec(BackboneConfig("efficientnet", "lite0", "random", 32))
EXTRACT = ExtractConfig(
    dtype="float16", codec="none", precision="float32", compiled=False, batch=10, shard=16, keep_levels=False,
    views=("identity", "rot90"),
)  # fmt: skip


@pytest.fixture(scope="module")
def dry_run(images, encoder):
    """The result of a dry run, at 10 images/s."""
    return dataclasses.replace(estimate.dry_run(images, encoder, 4), images_per_second=10.0)


@pytest.fixture
def make_schema(images, dry_run):
    """Function from a codec to a store's schema."""
    return lambda codec: engine.make_schema(
        images, SPEC, dry_run.pyramid, 32, dataclasses.replace(EXTRACT, codec=codec)
    )


@pytest.fixture
def set_free_bytes(monkeypatch):
    return lambda n_bytes: monkeypatch.setattr(
        estimate.shutil, "disk_usage", lambda path: SimpleNamespace(free=n_bytes)
    )


@pytest.mark.parametrize("codec", ["none", "zstd", "int8"])
def test_format_estimate_refuses_a_disk_that_is_too_small_before_anything_is_written(
    images, encoder, dry_run, make_schema, set_free_bytes, tmp_path, codec
):
    schema = make_schema(codec)
    writer = Writer(tmp_path / "scratch", schema, tmp_path / "store.zarr", {})
    engine.extract(images, encoder, writer, 10)
    set_free_bytes(0.2 * estimate.nbytes(schema))
    finished = estimate.format_estimate(schema, dry_run, tmp_path / "scratch", "tiles x lite0")
    assert "0.0 min" in finished
    assert "0.00 GB" in finished
    writer.finish()
    stored_bytes = sum(path.stat().st_size for path in (tmp_path / "store.zarr").rglob("c.*"))
    set_free_bytes(round(1.2 * stored_bytes))
    line = estimate.format_estimate(schema, dry_run, tmp_path / "new", "tiles x lite0")
    for text in ("tiles x lite0: 40 samples", "10.0 images/s", "0.1 min"):
        assert text in line
    set_free_bytes(round(0.8 * stored_bytes))
    with raises(UserError, "tiles x lite0", key="extract.codec", value=codec, path=tmp_path):
        estimate.format_estimate(schema, dry_run, tmp_path / "new", "tiles x lite0")
    assert not (tmp_path / "new").exists()


def test_format_estimate_accepts_features_too_large_for_float16(dry_run, make_schema, tmp_path):
    large = copy.deepcopy(dry_run)  # refused when they are stored
    large.pyramid.levels[0] *= 1e9
    estimate.format_estimate(make_schema("int8"), large, tmp_path, "tiles x lite0")


def test_dry_run_in_bfloat16_measures_the_difference_to_float32(images, encoder, monkeypatch):
    n_threads = torch.get_num_threads()
    result = estimate.dry_run(images, encoder, 4)
    assert result.precision_error == {}
    assert 0 < result.images_per_second < 1e5
    assert torch.get_num_threads() == n_threads
    lower_encoder = Encoder(encoder.preprocessor, encoder.network, "cpu", "bfloat16")
    lower = estimate.dry_run(images, lower_encoder, 4)
    assert list(lower.precision_error) == ["level0", "level1", "level2", "level3"]
    assert all(1e-4 < error < 0.3 for error in lower.precision_error.values())
    monkeypatch.setattr(estimate, "_MAX_PRECISION_ERROR", 1e-4)
    with raises(UserError, "%", key="extract.precision", value="bfloat16", allowed=("float32",)):
        estimate.dry_run(images, lower_encoder, 4)


def test_dry_run_of_a_network_that_does_not_work_on_the_images_is_refused(images, encoder):
    network = copy.deepcopy(encoder.network)
    next(network.parameters()).data.fill_(float("nan"))
    with raises(UserError, key="extract.precision", value="float32"):
        estimate.dry_run(images, Encoder(encoder.preprocessor, network, "cpu"), 4)
    with raises(UserError, 32, key="bands", value=("red", "green", "blue")):
        estimate.dry_run(images, Encoder(encoder.preprocessor, torch.nn.Conv2d(7, 3, 1), "cpu"), 4)


@pytest.mark.parametrize(
    ("maximum", "budget", "expected"), [(64, 1e9, 64), (48, 1e9, 32), (64, 160, 16), (64, 159, 8), (64, 1, 1)]
)
def test_largest_power_of_two_never_measures_a_batch_that_may_not_fit(maximum, budget, expected):
    """The search of `find_batch_size` on a GPU, without one."""
    measured = []

    def measure_bytes(batch):
        measured.append(batch)
        return 10 * batch

    assert estimate._largest_power_of_two(maximum, budget, measure_bytes) == expected
    assert max(measured) <= expected
