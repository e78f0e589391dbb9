"""The composition search on backbones with known information."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

from pipeline.composition import probes
from pipeline.composition.probes import Layer, Probe, ProbeSamples, mask_scores, pixel_samples
from pipeline.composition.search import CompositionResult, search, top_k
from pipeline.config import CompositionConfig, HeadsConfig, LinearHeadConfig, UPerNetHeadConfig
from pipeline.errors import UserError
from pipeline.tasks import IGNORE, Segmentation
from tests.errors import raises
from tests.pipeline.conftest import COUNT, SIDE, noise

HEADS = HeadsConfig(LinearHeadConfig("all", "mean", 10, 10), UPerNetHeadConfig(4, 4, 4))
COMPOSITION = CompositionConfig((), "logistic", 2, False)


def test_search_ranks_every_subset_and_the_most_informative_is_best(informative_chips):
    stores, images = informative_chips
    result = search(stores, images, HEADS, COMPOSITION)
    table = result.subsets.set_index("model")
    assert len(table) == 15
    assert result.backbones == tuple(stores)
    assert result.subsets.model[0] == "high+low"
    assert table.score["high+low"] > 0.95
    assert table.gain["high+low"] == table.score["high+low"] - max(table.score["high"], table.score["low"]) > 0.2
    assert result.selected[0] == "high+low"
    assert result.selected == tuple(top_k(result.subsets, 2))
    assert all("+" in model for model in top_k(result.subsets, 9))
    cka = result.cka.set_index(["level", "backbone_a", "backbone_b"]).cka
    assert cka["all", "none", "copy"] == pytest.approx(1, abs=1e-6)
    assert cka["level1", "high", "none"] < 0.2
    assert table.cka["none+copy"] == cka["all", "none", "copy"]
    assert table.channels["high+low"] == 10


def test_search_knn_probe_of_the_deepest_vector(informative_chips):
    stores, images = informative_chips
    heads = dataclasses.replace(HEADS, linear=dataclasses.replace(HEADS.linear, pooled="last"))
    result = search(stores, images, heads, dataclasses.replace(COMPOSITION, probe="knn"))
    assert result.probe == "knn"
    assert result.subsets.model[0] == "high+low"
    assert result.subsets.set_index("model").channels["high+low"] == 4


def test_search_greedy_adds_the_informative_layers_and_stops(informative_chips):
    stores, images = informative_chips
    greedy = search(stores, images, HEADS, dataclasses.replace(COMPOSITION, greedy=True)).greedy
    assert {(row.backbone, row.layer) for row in greedy.head(2).itertuples()} == {
        ("high", "mean_level1"),
        ("low", "mean_level1"),
    }
    assert greedy.score.is_monotonic_increasing
    assert len(greedy) < 8


def test_search_does_not_depend_on_the_test_split(informative_chips, feature_store):
    stores, images = informative_chips
    is_test = images.split.values == "test"
    changed_stores = {}
    for name, store in stores.items():
        arrays = {f"pooled/{vector}": store.read(f"pooled/{vector}", np.arange(COUNT)) for vector in store.pooled}
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
    label = images.label.values
    stores = {
        "a": feature_store("a", {"pooled/mean_level0": noise(0, 3) + 6 * label[:, [0]]}, images),
        "b": feature_store("b", {"pooled/mean_level0": noise(1, 3) + 6 * label[:, [1]]}, images),
    }
    table = search(stores, images, HEADS, COMPOSITION).subsets
    assert table.model[0] == "a+b"
    assert table.score[0] > 0.95


def test_mask_scores_equal_a_probe_on_enlarged_features(informative_masks):
    stores, images = informative_masks
    rows = {split: stores["fine"].rows(split) for split in ("train", "val")}
    masks = {split: images.label[index].values for split, index in rows.items()}
    task = Segmentation(3)
    train, val = (pixel_samples(stores, rows[split], masks[split], seed=0) for split in rows)
    probe = Probe(train, val, task, "logistic")
    layers = probe.layers
    _, linear = probe.fit(layers)
    ensemble = ("fine", "coarse")
    actual = mask_scores({ensemble: (layers, linear)}, probe, stores, rows["val"], masks["val"])[ensemble]

    standardized = []
    for layer in layers:
        level = torch.from_numpy(stores[layer.backbone].read(layer.array, rows["val"]))
        enlarged = functional.interpolate(level, SIDE, mode="bilinear").permute(0, 2, 3, 1)
        standardized.append(probe.scalers[layer].transform(enlarged.reshape(-1, enlarged.shape[-1]).numpy()))
    logits = linear.logits(np.concatenate(standardized, axis=1))
    counts = task.counts(logits.argmax(1).reshape(masks["val"].shape), masks["val"])
    assert actual == pytest.approx(task.score(counts.sum(0)), abs=2e-3)
    assert actual > 0.5


def test_search_segmentation_finds_the_informative_backbone(informative_masks):
    stores, images = informative_masks
    result = search(stores, images, HEADS, dataclasses.replace(COMPOSITION, probe="knn"))
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


def test_pixel_samples_are_labelled_pixels_with_interpolated_features(informative_masks, monkeypatch):
    stores, images = informative_masks
    monkeypatch.setattr(probes, "MAX_PIXELS", 600)
    rows = stores["fine"].rows("train")
    masks = images.label[rows].values.copy()
    masks[0] = IGNORE
    masks[0, 5, 9] = 1  # a single labelled pixel
    samples = pixel_samples(stores, rows, masks, seed=3)
    assert len(samples.label) == 1 + 59 * 10
    assert samples.label[0] == 1
    assert IGNORE not in samples.label
    for layer, values in samples.features.items():
        level = torch.from_numpy(stores[layer.backbone].read(layer.array, rows[:1]))
        enlarged = functional.interpolate(level, SIDE, mode="bilinear")
        np.testing.assert_allclose(values[0], enlarged[0, :, 5, 9], rtol=1e-5, atol=1e-5)


def test_probe_samples_concatenate_in_the_given_order():
    a, b = Layer("a", "pooled/x"), Layer("b", "pooled/x")
    samples = ProbeSamples({a: np.zeros((3, 2)), b: np.ones((3, 1))}, np.zeros(3))
    assert samples.concatenate([b, a]).tolist() == [[1, 0, 0]] * 3


def test_composition_result_reads_what_it_wrote(informative_chips, tmp_path):
    stores, images = informative_chips
    result = dataclasses.replace(
        search(stores, images, HEADS, dataclasses.replace(COMPOSITION, greedy=True)),
        skipped=("x needs the bands nir.",),
        trained=("high+low",),
    )
    result.write(tmp_path)
    copy = CompositionResult.read(tmp_path)
    for field in dataclasses.fields(CompositionResult):
        actual, expected = getattr(copy, field.name), getattr(result, field.name)
        if isinstance(expected, pd.DataFrame):
            pd.testing.assert_frame_equal(actual, expected)
        else:
            assert actual == expected


def test_composition_result_without_backbones_has_empty_tables(tmp_path):
    CompositionResult(skipped=("x needs the bands nir.",)).write(tmp_path)
    result = CompositionResult.read(tmp_path)
    assert result.skipped == ("x needs the bands nir.",)
    assert len(result.subsets) == len(result.cka) == len(result.greedy) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["composition.json"]
