"""A source, a family, a head and a fusion from outside the packages run from raw data to a test score."""

import sys

import pytest

from pipeline import heads
from pipeline.backbones import base, register_family
from pipeline.config import (
    BackboneConfig,
    ComputeConfig,
    CustomHeadConfig,
    DatasetConfig,
    ExtractConfig,
    HeadsConfig,
    LinearHeadConfig,
    UPerNetHeadConfig,
)
from pipeline.data import image_writer, sources
from pipeline.errors import UserError
from pipeline.extraction import launch
from pipeline.heads import fusion
from pipeline.training import protocol, task_data
from tests import additions
from tests.errors import raises

DATASET = DatasetConfig("drawn", task="segmentation")
EXTRACT = ExtractConfig(
    dtype="float32", codec="none", precision="float32", compiled=False, batch=8, shard=16, keep_levels=True,
    views=("identity",),
)  # fmt: skip
HEADS = HeadsConfig(
    LinearHeadConfig("all", "mean", steps=10, batch=4),
    UPerNetHeadConfig(channels=4, steps=10, batch=4),
    segmentation="finest",
    fusion="sum",
    custom={"finest": CustomHeadConfig(steps=100, batch=8, options={"bias": True})},
)


@pytest.fixture
def registered(monkeypatch):
    """Register one addition of each kind; the registries are restored afterwards."""
    monkeypatch.setattr(sources, "_registered", dict(sources._registered))
    monkeypatch.setattr(base, "_FAMILIES", dict(base._FAMILIES))
    monkeypatch.setattr(heads, "HEADS", dict(heads.HEADS))
    monkeypatch.setattr(fusion, "FUSIONS", dict(fusion.FUSIONS))
    sources.register("drawn", sys.modules[additions.__name__])
    register_family("averages", additions.FAMILY)
    heads.register_head("finest", additions.FinestHead)
    fusion.register_fusion("sum", additions.SumFusion)


def test_additions_from_outside_reach_a_test_score(registered, tmp_path):
    sources.validate("drawn-set", DATASET)
    images_path = tmp_path / "images.zarr"
    image_writer.write(sources.get_source("drawn").prepare(tmp_path, DATASET), tmp_path / "scratch", images_path)
    stores = {}
    for variant in additions.FAMILY.variants:
        backbone = BackboneConfig("averages", variant, "none", additions.SIDE)
        stores[tmp_path / f"{variant}.zarr"] = None
        (tmp_path / "source.json").write_text('{"weights": "none"}')
        job = launch.ExtractionJob(
            variant, backbone, EXTRACT, "cpu", images_path=images_path, weights_dir=tmp_path,
            scratch=tmp_path / "scratch" / variant, final=tmp_path / f"{variant}.zarr",
        )  # fmt: skip
        launch.launch(job, ComputeConfig("cpu", 0, ""))
    data = task_data.load(stores, images_path, HEADS, ("train", "val", "test"), "cpu")
    hparams = {"learning_rate": 0.05, "weight_decay": 0.01}
    result = protocol.train_and_test(data, hparams, 2, {"dataset": "drawn-set", "model": "plain+again"})
    assert (result.runs.score > 0.95).all()
    assert result.runs["head"].str.startswith("finest").all()


def test_additions_without_registration_are_refused_with_the_known_names():
    with raises(UserError, key="source", value="drawn"):
        sources.validate("drawn-set", DATASET)
    with raises(UserError, key="family", value="averages", allowed=base._FAMILIES):
        base.get_spec(BackboneConfig("averages", "plain", "none", additions.SIDE))
    with raises(UserError, key="heads.segmentation", value="finest", allowed=("upernet", "fcn")):
        heads.get_head("finest")
    with raises(UserError, key="heads.fusion", value="sum", allowed=fusion.FUSIONS):
        fusion.get_fusion("sum")


def test_registration_of_a_taken_name_is_refused(registered):
    with pytest.raises(ValueError, match="upernet"):
        heads.register_head("upernet", additions.FinestHead)
    with pytest.raises(ValueError, match="concat"):
        fusion.register_fusion("concat", additions.SumFusion)
    with pytest.raises(ValueError, match="hiera"):
        register_family("hiera", additions.FAMILY)
    with raises(UserError, key="source", value="custom"):
        sources.register("custom", sys.modules[additions.__name__])
