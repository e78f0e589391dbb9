"""The protocol of sources: lookup, defaults, and a source from outside the package."""

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest

from pipeline.bands import Band
from pipeline.config import DatasetConfig, SplitFractions
from pipeline.data import sources
from pipeline.data.image_store import ImageDataset
from pipeline.errors import UserError
from tests.errors import raises


@dataclass(frozen=True)
class NoiseOptions:
    """`datasets.*.options` of the source in this test."""

    count: int = 8


def prepare(raw, dataset: DatasetConfig) -> ImageDataset:
    options = sources.parse_options(dataset)
    return ImageDataset(
        image=np.random.default_rng(dataset.seed).integers(0, 255, (options.count, 1, 16, 16), np.uint8),
        label=np.arange(options.count) % 2,
        sample=[f"s{index}" for index in range(options.count)],
        split=(["train", "train", "val", "test"] * options.count)[: options.count],
        bands=[Band("R", "red")], classes=["a", "b"], task=dataset.task, units="uint8", gsd=1.0, licence="none",
        source="noise",
    )  # fmt: skip


@pytest.fixture
def noise(monkeypatch):
    """Register the source `noise`, a module outside the package."""
    monkeypatch.setattr(sources, "_registered", {})
    module = ModuleType("noise_source")
    module.prepare, module.fetch = prepare, lambda dataset, params: {"source": "noise"}
    module.REQUIRED_KEYS, module.Options = ("task",), NoiseOptions
    sources.register("noise", module)
    return module


def test_get_source_fills_in_the_defaults_of_the_protocol():
    source = sources.get_source("neon_trees")
    assert source.ARCHIVE.package == "deepforest"
    assert source.REQUIRED_KEYS == ("task", "chip", "block", "splits")
    assert (source.OPTIONAL_KEYS, source.Options) == ((), None)
    assert source.estimate_size(DatasetConfig("neon_trees"), None) is None


@pytest.mark.parametrize("name", sources.source_names())
def test_get_source_every_module_satisfies_the_protocol(name):
    source = sources.get_source(name)
    assert callable(source.prepare)
    assert source.ARCHIVE or source.fetch is not sources.Source.fetch


def test_get_source_unknown_name_is_refused():
    with raises(
        UserError, key="source", value="nothing", allowed=["custom", "geobench", "neon_trees", "osm_landuse"]
    ):
        sources.get_source("nothing")


def test_register_source_from_outside_the_package_is_prepared(noise, open_images, tmp_path):
    dataset = DatasetConfig("noise", task="classification", options={"count": 12})
    sources.validate("x", dataset)
    images = open_images(sources.get_source("noise").prepare(tmp_path, dataset))
    assert images.sizes["sample"] == 12
    assert sources.get_source("noise").fetch(dataset, None) == {"source": "noise"}
    assert sources.source_module("noise") is noise
    with raises(UserError, key="datasets.x.options.size"):
        sources.validate("x", DatasetConfig("noise", task="classification", options={"size": 12}))


@pytest.mark.usefixtures("noise")
def test_register_taken_name_or_incomplete_module_is_refused():
    for name in ("noise", "custom"):
        with raises(UserError, key="source", value=name):
            sources.register(name, ModuleType("noise_source"))
    with raises(UserError, "no_source", key="source", value="other"):
        sources.register("other", ModuleType("no_source"))


@pytest.mark.parametrize(
    ("dataset", "fields"),
    [
        (DatasetConfig("neon_trees", task="classification"), {"key": "datasets.x.chip"}),
        (DatasetConfig("geobench", chip=64), {"key": "datasets.x.chip", "allowed": ()}),
        (
            DatasetConfig("neon_trees", "segmentation", 64, 128, SplitFractions(0.6, 0.2, 0.2), options={"a": 1}),
            {"key": "datasets.x.options", "value": {"a": 1}},
        ),
    ],
)
def test_validate_missing_or_unused_key_is_refused(dataset, fields):
    with raises(UserError, **fields):
        sources.validate("x", dataset)
