import dataclasses
from types import SimpleNamespace

import pytest
import torch

from cache.writer import Writer
from pipeline.backbones import get_spec
from pipeline.backbones.encoder import Encoder
from pipeline.config import BackboneConfig, ExtractConfig
from pipeline.data import image_store
from pipeline.errors import UserError
from pipeline.extraction import engine, estimate

BACKBONE = BackboneConfig("efficientnet", "lite0", "random", 64)
EXTRACT = ExtractConfig(
    dtype="float16", codec="none", precision="float32", compiled=False, batch=10, shard=16, keep_levels=False,
    views=("identity", "rot90"),
)  # fmt: skip


@pytest.fixture
def tiles(images_path):
    return image_store.open_images(images_path("sample-landuse-seg"))


@pytest.fixture
def sealed(tiles, make_encoder):
    return make_encoder(tiles, "efficientnet", "lite0", 64)


@pytest.fixture
def laid(tiles, sealed):
    """The first look at the tiles, and their layout with a codec."""
    seen = dataclasses.replace(estimate.dry_run(tiles, sealed, 4), rate=10.0)

    def lay(codec):
        described = dataclasses.replace(EXTRACT, codec=codec)
        return engine.make_layout(tiles, get_spec(BACKBONE), seen.pyramid, 64, described), seen

    return lay


@pytest.fixture
def free(monkeypatch):
    def leave(count):
        monkeypatch.setattr(estimate.shutil, "disk_usage", lambda place: SimpleNamespace(free=count))

    return leave


@pytest.mark.parametrize("codec", ["none", "zstd", "int8"])
def test_a_disk_that_cannot_hold_it_is_refused_before_anything_is_written(tiles, sealed, laid, free, tmp_path, codec):
    layout, seen = laid(codec)
    writer = Writer(tmp_path / "scratch", layout, tmp_path / "store.zarr", {})
    engine.extract(tiles, sealed, writer, 10)
    writer.finish()
    stored = sum(path.stat().st_size for path in (tmp_path / "store.zarr").rglob("c.*"))
    line = estimate.format_estimate(layout, seen, tmp_path / "new", "tiles x lite0")
    assert line.startswith("tiles x lite0: 72 samples at 10.0 images/s take this process about 0.2 min and 0.0")
    free(round(1.2 * stored))
    estimate.format_estimate(layout, seen, tmp_path / "new", "tiles x lite0")
    free(round(0.8 * stored))
    with pytest.raises(UserError, match="The disk cannot hold it"):
        estimate.format_estimate(layout, seen, tmp_path / "new", "tiles x lite0")
    assert not (tmp_path / "new").exists()


def test_what_an_earlier_run_left_is_not_needed_twice(tiles, sealed, laid, free, tmp_path):
    layout, seen = laid("none")
    writer = Writer(tmp_path / "scratch", layout, tmp_path / "store.zarr", {})
    whole = estimate.nbytes(layout)
    engine.extract(tiles, sealed, writer, 10)
    free(0.2 * whole)
    line = estimate.format_estimate(layout, seen, tmp_path / "scratch", "tiles x lite0")
    assert "take this process about 0.0 min and 0.00 GB" in line


def test_what_lower_precision_changes_is_measured(tiles, sealed):
    threads = torch.get_num_threads()
    exact = estimate.dry_run(tiles, sealed, 4)
    assert exact.precision_error == {}
    assert 0 < exact.images_per_second < 1e5
    assert torch.get_num_threads() == threads
    lower = estimate.dry_run(tiles, Encoder(sealed.inputs, sealed.network, "cpu", "bfloat16"), 4)
    assert list(lower.precision_error) == ["level0", "level1", "level2", "level3"]
    assert all(1e-4 < error < 0.3 for error in lower.precision_error.values())


def test_features_that_lower_precision_spoils_are_refused(tiles, sealed, monkeypatch):
    monkeypatch.setattr(estimate, "_WRONG", 1e-4)
    with pytest.raises(UserError, match=r"in bfloat16 differ from those in float32 by \d+% on cpu"):
        estimate.dry_run(tiles, Encoder(sealed.inputs, sealed.network, "cpu", "bfloat16"), 4)


def test_a_network_that_does_not_take_the_images_says_so(tiles, sealed):
    wrong = torch.nn.Conv2d(7, 3, 1)
    with pytest.raises(UserError, match=r"does not take 3 bands \(red, green, blue\) of 64 px: .*expected input"):
        estimate.dry_run(tiles, Encoder(sealed.inputs, wrong, "cpu"), 4)


def test_features_too_large_for_int8_in_float16_are_left_to_the_store(laid, tmp_path):
    layout, seen = laid("int8")
    seen.pyramid.levels[0] *= 1e9
    estimate.format_estimate(layout, seen, tmp_path, "tiles x lite0")
