"""The protocol of sources. tests/test_adding.py runs a source from outside the package."""

from dataclasses import dataclass
from types import ModuleType

import pytest

from pipeline.config import DatasetConfig, SplitFractions
from pipeline.data import sources
from pipeline.errors import UserError
from tests.errors import raises


@dataclass(frozen=True)
class NoiseOptions:
    count: int = 8


NAMES = ("custom", "geobench", "neon_trees", "osm_landuse")


@pytest.mark.parametrize("name", NAMES)
def test_get_source_every_module_satisfies_the_protocol(name):
    source = sources.get_source(name)
    assert callable(source.prepare)
    assert source.ARCHIVE or source.fetch is not sources.Source.fetch
    with raises(UserError, key="source", value="nothing", allowed=NAMES):
        sources.get_source("nothing")


def test_register_source_with_options_or_without_prepare(monkeypatch):
    monkeypatch.setattr(sources, "_registered", {})
    module = ModuleType("noise_source")
    with raises(UserError, "noise_source", key="source", value="noise"):
        sources.register("noise", module)
    module.prepare = module.fetch = lambda dataset, params: {}
    module.Options = NoiseOptions
    sources.register("noise", module)
    assert sources.source_module("noise") is module
    assert sources.parse_options(DatasetConfig("noise", options={"count": 12})) == NoiseOptions(12)
    with raises(UserError, key="datasets.x.options.size"):
        sources.validate("x", DatasetConfig("noise", options={"size": 12}))
    with raises(UserError, key="source", value="noise"):
        sources.register("noise", module)


@pytest.mark.parametrize(
    ("dataset", "fields"),
    [
        (DatasetConfig("neon_trees", task="classification"), {"key": "datasets.x.chip"}),
        (DatasetConfig("geobench", chip=64), {"key": "datasets.x.chip", "allowed": ()}),
        (DatasetConfig("neon_trees", "segmentation", 64, 128, SplitFractions(0.6, 0.2, 0.2), options={"a": 1}),
         {"key": "datasets.x.options", "value": {"a": 1}}),
    ],
)  # fmt: skip
def test_validate_missing_or_unused_key_is_refused(dataset, fields):
    with raises(UserError, **fields):
        sources.validate("x", dataset)
