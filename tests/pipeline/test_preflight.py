from types import SimpleNamespace

import pytest

from cache.write import Writer
from pipeline import extract as engine
from pipeline import images, preflight
from pipeline.backbones import spec
from pipeline.encode import Encoder
from pipeline.errors import UserError
from pipeline.params import Backbone, Extract

BACKBONE = Backbone("efficientnet", "lite0", "random", 64)
EXTRACT = Extract(
    dtype="float16", codec="none", precision="float32", compiled=False, batch=10, shard=16, dense=False,
    views=("identity", "rot90"),
)  # fmt: skip


@pytest.fixture
def tiles(store):
    return images.open_images(store("sample-landuse-seg"))


@pytest.fixture
def sealed(tiles, encoder_of):
    return encoder_of(tiles, "efficientnet", "lite0", 64)


def test_a_disk_that_cannot_hold_it_is_refused_before_anything_is_written(tiles, sealed, monkeypatch, tmp_path):
    seen = preflight.look(tiles, sealed, 4)
    layout = engine.make_layout(tiles, spec(BACKBONE), seen.pyramid, 64, EXTRACT)
    writer = Writer(tmp_path / "scratch", layout, tmp_path / "store.zarr", {})
    engine.extract(tiles, sealed, writer, 10)
    writer.finish()
    stored = sum(path.stat().st_size for path in (tmp_path / "store.zarr").rglob("c.*"))
    assert preflight.nbytes(layout) == pytest.approx(stored, rel=0.15)  # the last shard of vectors is padded
    line = preflight.announce(layout, 10.0, tmp_path / "new", "tiles x lite0")
    assert line.startswith("tiles x lite0: 72 samples at 10.0 images/s take about 0.2 min and 0.00 GB uncompressed")
    monkeypatch.setattr(
        preflight.shutil, "disk_usage", lambda place: SimpleNamespace(free=preflight.nbytes(layout) - 1)
    )
    with pytest.raises(UserError, match="The disk cannot hold it"):
        preflight.announce(layout, 10.0, tmp_path / "new", "tiles x lite0")
    assert not (tmp_path / "new").exists()
    # What an earlier run left is not needed twice.
    assert "and 0.00 GB" in preflight.announce(layout, 10.0, tmp_path / "store.zarr", "tiles x lite0")


def test_what_lower_precision_changes_is_measured(tiles, sealed):
    exact = preflight.look(tiles, sealed, 4)
    assert exact.precision_error == {}
    assert exact.rate > 0
    lower = preflight.look(tiles, Encoder(sealed.inputs, sealed.network, "cpu", "bfloat16"), 4)
    assert list(lower.precision_error) == ["level0", "level1", "level2", "level3"]
    assert all(1e-4 < error < 0.3 for error in lower.precision_error.values())
