"""The composition search on backbones with known information."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

from cache.schema import pooled_array
from pipeline.composition import KEYS, TABLES, CompositionResult, probes
from pipeline.composition.probes import Probe, mask_scores, pixel_samples
from pipeline.composition.search import search
from pipeline.config import CompositionConfig, HeadsConfig, LinearHeadConfig, UPerNetHeadConfig
from pipeline.errors import UserError
from pipeline.tasks import IGNORE, Segmentation
from tests.errors import raises
from tests.pipeline.conftest import COUNT, SIDE, noise

HEADS = HeadsConfig(LinearHeadConfig("all", "mean", 10, 10), UPerNetHeadConfig(4, 4, 4))
COMPOSITION = CompositionConfig((), "logistic", 2, False)


def test_search_finds_the_informative_ensemble_and_layers(informative_chips, tmp_path):
    stores, images = informative_chips
    result = search(stores, images, HEADS, dataclasses.replace(COMPOSITION, greedy=True))
    table = result.subsets.set_index("model")
    assert len(table) == 15
    assert result.backbones == tuple(stores)
    assert result.subsets.model[0] == "high+low"
    assert table.score["high+low"] > 0.95
    assert table.gain["high+low"] == table.score["high+low"] - max(table.score["high"], table.score["low"]) > 0.2
    assert result.selected == tuple(table.index[table.members > 1][:2])
    cka = result.cka.set_index(["level", "backbone_a", "backbone_b"]).cka
    assert cka["all", "none", "copy"] == pytest.approx(1, abs=1e-6)
    assert cka["level1", "high", "none"] < 0.2
    assert table.cka["none+copy"] == cka["all", "none", "copy"]
    assert table.channels["high+low"] == 10
    assert set(result.greedy.backbone.head(2)) == {"high", "low"}
    assert set(result.greedy.layer.head(2)) == {"mean_level1"}
    assert result.greedy.score.is_monotonic_increasing
    assert len(result.greedy) < 8

    result = dataclasses.replace(result, skipped=("x needs the bands nir.",))
    result.write(tmp_path)
    copy = CompositionResult.read(tmp_path)
    for table in TABLES:
        pd.testing.assert_frame_equal(getattr(copy, table), getattr(result, table))
    assert all(getattr(copy, key) == getattr(result, key) for key in KEYS)


def test_search_knn_probe_of_the_deepest_vector(informative_chips):
    heads = dataclasses.replace(HEADS, linear=dataclasses.replace(HEADS.linear, pooled="last"))
    result = search(*informative_chips, heads, dataclasses.replace(COMPOSITION, probe="knn"))
    assert result.probe == "knn"
    assert result.subsets.model[0] == "high+low"
    assert result.subsets.set_index("model").channels["high+low"] == 4


def test_search_does_not_depend_on_the_test_split(informative_chips, feature_store):
    stores, images = informative_chips
    stores = {name: stores[name] for name in ("high", "low")}
    is_test = images.split.values == "test"
    changed_stores = {}
    for name, store in stores.items():
        arrays = {array: store.read(array, np.arange(COUNT)) for array in map(pooled_array, store.pooled)}
        for values in arrays.values():
            values[is_test] = 1e6
        changed_stores[name] = feature_store(f"{name}-changed", arrays, images)
    changed_images = images.copy(deep=True).load()
    changed_images.label[is_test] = 0
    expected = search(stores, images, HEADS, COMPOSITION)
    actual = search(changed_stores, changed_images, HEADS, COMPOSITION)
    assert actual.subsets.equals(expected.subsets)
    assert actual.cka.equals(expected.cka)


def test_search_multilabel(task_images, feature_store):
    images = task_images("multilabel")
    informative = {
        name: {"pooled/mean_level0": noise(i, 3) + 6 * images.label.values[:, [i]]} for i, name in enumerate("ab")
    }
    stores = {name: feature_store(name, arrays, images) for name, arrays in informative.items()}
    table = search(stores, images, HEADS, COMPOSITION).subsets
    assert table.model[0] == "a+b"
    assert table.score[0] > 0.95


def test_search_segmentation_finds_the_informative_backbone(informative_masks):
    result = search(*informative_masks, HEADS, dataclasses.replace(COMPOSITION, probe="knn"))
    table = result.subsets.set_index("model")
    assert result.probe == "logistic"
    assert table.score["fine"] > table.score["coarse"] + 0.2
    assert set(result.cka.level) == {"level0", "level1", "all"}


@pytest.mark.parametrize(("split", "n_pixels"), [("train", 0), ("train", 3), ("val", 0)])
def test_search_too_few_labels_is_refused(informative_masks, split, n_pixels):
    stores, images = informative_masks
    masks = images.label.values.copy()
    rows = stores["fine"].rows(split)
    masks[rows] = IGNORE
    masks[rows[0], 5, :n_pixels] = 1
    with raises(UserError, key=split, value=n_pixels):
        search(stores, images.assign(label=(images.label.dims, masks)), HEADS, COMPOSITION)


def test_mask_scores_equal_a_probe_on_enlarged_features(informative_masks, monkeypatch):
    """Its samples are labelled pixels with interpolated features."""
    monkeypatch.setattr(probes, "MAX_PIXELS", 600)
    (stores, images), task = informative_masks, Segmentation(3)
    rows = {split: stores["fine"].rows(split) for split in ("train", "val")}
    masks = {split: images.label[index].values for split, index in rows.items()}
    masks["train"][0] = IGNORE
    masks["train"][0, 5, 9] = 1  # a single labelled pixel
    train, val = (pixel_samples(stores, rows[split], masks[split], seed=0) for split in rows)

    def enlarged(layer, index):
        level = torch.from_numpy(stores[layer.backbone].read(layer.array, index))
        return functional.interpolate(level, SIDE, mode="bilinear").permute(0, 2, 3, 1).numpy()

    assert len(train.label) == 1 + 59 * 10
    assert train.label[0] == 1
    assert IGNORE not in train.label
    for layer, values in train.features.items():
        np.testing.assert_allclose(values[0], enlarged(layer, rows["train"][:1])[0, 5, 9], rtol=1e-5, atol=1e-5)

    probe = Probe(train, val, task, "logistic")
    _, linear = probe.fit(probe.layers)
    ensemble = ("fine", "coarse")
    actual = mask_scores({ensemble: (probe.layers, linear)}, probe, stores, rows["val"], masks["val"])[ensemble]
    features = {layer: enlarged(layer, rows["val"]).reshape(-1, probe.width(layer)) for layer in probe.layers}
    inputs = np.concatenate([probe.scalers[layer].transform(values) for layer, values in features.items()], axis=1)
    counts = task.counts(linear.logits(inputs).argmax(1).reshape(masks["val"].shape), masks["val"])
    assert actual == pytest.approx(task.score(counts.sum(0)), abs=2e-3)
    assert actual > 0.5


def test_composition_result_without_backbones_has_empty_tables(tmp_path):
    CompositionResult(skipped=("x needs the bands nir.",)).write(tmp_path)
    result = CompositionResult.read(tmp_path)
    assert result.skipped == ("x needs the bands nir.",)
    assert len(result.subsets) == len(result.cka) == len(result.greedy) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["composition.json"]


def test_composition_result_missing_from_ignores_the_order_of_members():
    assert CompositionResult(selected=("a+b", "a+c")).missing_from(["b", "c", "b+a"]) == ["a+c"]
