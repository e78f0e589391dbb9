"""The composition search on backbones that are told what they know."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.composition import points, search
from pipeline.composition.points import ProbeSamples
from pipeline.composition.probes import Probe, mask_scores
from pipeline.config import CompositionConfig, HeadsConfig, LinearHeadConfig, UPerNetHeadConfig
from pipeline.data import image_store
from pipeline.tasks import Segmentation
from pipeline.errors import UserError
from tests.pipeline.conftest import COUNT, SIDE, noise

HEADS = HeadsConfig(LinearHeadConfig("all", "mean", 10, 10), UPerNetHeadConfig(4, 4, 4))
DESCRIBED = CompositionConfig((), "logistic", 2, False)


def test_every_subset_and_the_one_that_knows_all_is_best(informative_chips):
    members, like = informative_chips
    found = search.search(members, like, HEADS, DESCRIBED)
    table = found.subsets.set_index("model")
    assert len(table) == 15
    assert found.subsets.model[0] == "high+low"
    assert table.score["high+low"] > 0.95
    assert table.gain["high+low"] == table.score["high+low"] - max(table.score["high"], table.score["low"]) > 0.2
    assert search.top_k(found.subsets, 2)[0] == "high+low"
    assert all("+" in model for model in search.top_k(found.subsets, 9))
    cka = found.cka.set_index(["level", "one", "other"]).cka
    assert cka["all", "none", "copy"] == pytest.approx(1, abs=1e-6)
    assert cka["level1", "high", "none"] < 0.2
    assert table.cka["none+copy"] == cka["all", "none", "copy"]
    assert table.channels["high+low"] == 10


def test_neighbours_as_the_probe_and_the_deepest_vector_alone(informative_chips):
    members, like = informative_chips
    heads = dataclasses.replace(HEADS, linear=dataclasses.replace(HEADS.linear, pooled="last"))
    found = search.search(members, like, heads, dataclasses.replace(DESCRIBED, probe="knn"))
    assert found.probe == "knn"
    assert found.subsets.model[0] == "high+low"
    assert found.subsets.set_index("model").channels["high+low"] == 4


def test_greedy_takes_the_layers_that_know_and_stops(informative_chips):
    members, like = informative_chips
    found = search.search(members, like, HEADS, dataclasses.replace(DESCRIBED, greedy=True))
    steps = found.greedy
    assert {(row.backbone, row.layer) for row in steps.head(2).itertuples()} == {
        ("high", "mean_level1"), ("low", "mean_level1"),
    }  # fmt: skip
    assert steps.score.is_monotonic_increasing
    assert len(steps) < 8


def test_what_lies_in_the_test_split_changes_nothing(informative_chips, feature_store, task_images):
    members, like = informative_chips
    test = like.split.values == "test"
    spoilt = {}
    for name, store in members.items():
        values = {f"pooled/{layer}": store.read(f"pooled/{layer}", np.arange(COUNT)) for layer in store.pooled}
        for value in values.values():
            value[test] = 1e6
        spoilt[name] = feature_store(f"{name}-spoilt", values, like)
    other = like.copy(deep=True).load()
    other.label[test] = 0
    ours, theirs = (search.search(m, one, HEADS, DESCRIBED) for m, one in ((members, like), (spoilt, other)))
    assert ours.subsets.equals(theirs.subsets)
    assert ours.cka.equals(theirs.cka)


def test_multilabel(task_images, feature_store):
    like = task_images("multilabel")
    values = {"pooled/mean_level0": noise(0, 3) + 6 * like.label.values[:, [0]]}
    other = {"pooled/mean_level0": noise(1, 3) + 6 * like.label.values[:, [1]]}
    members = {"one": feature_store("one", values, like), "two": feature_store("two", other, like)}
    table = search.search(members, like, HEADS, DESCRIBED).subsets
    assert table.model[0] == "one+two"
    assert table.score[0] > 0.95


def test_masks_are_scored_as_if_the_features_had_been_enlarged(informative_masks):
    members, like = informative_masks
    rows = {split: members["fine"].rows(split) for split in ("train", "val")}
    masks = {split: like.label[index].values for split, index in rows.items()}
    train, val = (points.pixel_samples(members, rows[split], masks[split], image_store.IGNORE, 0) for split in rows)
    probe = Probe(train, val, search.task_from_store(like), "logistic")
    names, layers = ("fine", "coarse"), probe.layers
    _, linear = probe.fit(layers)
    ours = mask_scores({names: (layers, linear)}, probe, members, rows["val"], masks["val"])[names]
    large = [
        functional.interpolate(
            torch.from_numpy(members[n].read(f"{level}/features", rows["val"])), SIDE, mode="bilinear"
        )
        for n, level in layers
    ]
    scaled = [
        probe.scalers[layer].transform(one.permute(0, 2, 3, 1).reshape(-1, one.shape[1]).numpy())
        for layer, one in zip(layers, large, strict=True)
    ]
    said = linear.logits(np.concatenate(scaled, axis=1)).argmax(1).reshape(masks["val"].shape)
    counts = Segmentation(3).counts(said, masks["val"]).sum(0)
    assert ours == pytest.approx(Segmentation(3).score(counts), abs=2e-3)
    assert ours > 0.5


def test_segmentation_finds_who_knows(informative_masks):
    members, like = informative_masks
    found = search.search(members, like, HEADS, dataclasses.replace(DESCRIBED, probe="knn"))
    table = found.subsets.set_index("model")
    assert found.probe == "logistic"
    assert table.score["fine"] > table.score["coarse"] + 0.2
    assert set(found.cka.level) == {"level0", "level1", "all"}


@pytest.mark.parametrize(("split", "count"), [("train", 0), ("train", 3), ("val", 0)])
def test_too_few_labels_are_refused(informative_masks, split, count):
    members, like = informative_masks
    masks = like.label.values.copy()
    rows = members["fine"].rows(split)
    masks[rows] = image_store.IGNORE
    masks[rows[0], 5, :count] = 1
    with pytest.raises(UserError, match=f"The split {split} has {count} labelled pixels"):
        search.search(members, like.assign(label=(like.label.dims, masks)), HEADS, DESCRIBED)


def test_pixels_are_labelled_ones_and_features_those_beneath_them(informative_masks, monkeypatch):
    members, like = informative_masks
    monkeypatch.setattr(points, "PIXELS", 600)
    rows = members["fine"].rows("train")
    masks = like.label[rows].values.copy()
    masks[0] = image_store.IGNORE
    masks[0, 5, 9] = 1  # one labelled pixel alone
    taken = points.pixel_samples(members, rows, masks, image_store.IGNORE, seed=3)
    assert len(taken.label) == 1 + 59 * 10
    assert taken.label[0] == 1
    assert image_store.IGNORE not in taken.label
    for layer, values in taken.features.items():
        level = torch.from_numpy(members[layer[0]].read(f"{layer[1]}/features", rows[:1]))
        large = functional.interpolate(level, SIDE, mode="bilinear")
        np.testing.assert_allclose(values[0], large[0, :, 5, 9], rtol=1e-5, atol=1e-5)


def test_joined_layers_keep_their_order():
    taken = ProbeSamples({("a", "x"): np.zeros((3, 2)), ("b", "x"): np.ones((3, 1))}, np.zeros(3))
    assert taken.concatenate([("b", "x"), ("a", "x")]).tolist() == [[1, 0, 0]] * 3
