"""Mistakes that raise nothing and only make scores wrong: each is planted here and must show."""

import dataclasses

import numpy as np
import pytest
import torch

from cache.errors import StoreError
from cache.schema import StoreSchema
from cache.writer import Writer
from pipeline.bands import Band
from pipeline.config import HeadsConfig, LinearHeadConfig, UPerNetHeadConfig
from pipeline.data import image_store, image_writer
from pipeline.data.image_store import IGNORE
from pipeline.data.sources import osm_landuse
from pipeline.tasks import Classification
from pipeline.training import loop, task_data

SMALL = HeadsConfig(
    LinearHeadConfig("all", "mean", steps=200, batch=64), UPerNetHeadConfig(channels=8, steps=5, batch=4)
)


@pytest.fixture
def encoder(open_images, make_encoder, weights_folder):
    """From a dataset in memory to a stand-in's encoder."""
    return lambda made, variant: make_encoder(open_images(made), "efficientnet", variant, folder=weights_folder(variant))


# Bands and units


@pytest.mark.parametrize("variant", ["csmask_b4", "lite0"])
def test_bands_are_found_by_name_whatever_their_order_in_the_store(image_dataset, encoder, variant):
    made = image_dataset("sample-landuse")
    order = np.random.default_rng(0).permutation(13)
    shuffled = dataclasses.replace(made, image=made.image[:, order], bands=[made.bands[i] for i in order])
    ours, theirs = (encoder(one, variant).prepare(one.image[:3]) for one in (made, shuffled))
    assert torch.equal(ours, theirs)


def test_a_wrong_band_order_changes_the_features(image_dataset, encoder):
    made = image_dataset("sample-landuse")
    sealed = encoder(made, "lite0")
    right, wrong = sealed(made.image[:3]), sealed(made.image[:3, ::-1])
    assert np.abs(right.pooled["mean_level3"] - wrong.pooled["mean_level3"]).max() > 0.1


def test_rgb_is_not_bgr(image_dataset, encoder):
    made = image_dataset("sample-trees")
    tensor = encoder(made, "lite0").prepare(made.image[:1])
    assert made.bands[0] == Band("R", "red", 0.665, 0.1)
    expected = made.image[0].astype(np.float32).mean(axis=(1, 2)) / 255
    np.testing.assert_allclose(tensor[0].mean(dim=(1, 2)) * 0.502 + 0.498, expected, atol=1e-4)


def test_dn_and_reflectance_of_one_scene_reach_the_network_alike(image_dataset, encoder):
    made = image_dataset("sample-landuse")
    scaled = dataclasses.replace(made, image=made.image.astype(np.float32) / 10000, units="reflectance")
    for variant in ("csmask_b4", "lite0"):
        ours, theirs = (encoder(one, variant).prepare(one.image[:3]) for one in (made, scaled))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_reflectance_read_as_dn_is_visible(image_dataset, encoder):
    made = image_dataset("sample-landuse")
    wrong = dataclasses.replace(made, image=made.image.astype(np.float32) / 10000)  # still says DN
    ours, theirs = (encoder(one, "csmask_b4").prepare(one.image[:3]) for one in (made, wrong))
    assert (ours - theirs).abs().mean() > 0.3


# Place


def test_latitude_and_longitude_are_not_swapped(image_dataset):
    made = image_dataset("sample-landuse")
    # The scene lies west of Berlin; rows run south, columns east.
    assert (made.lat.min(), made.lat.max()) == pytest.approx((52.45, 52.52), abs=0.05)
    assert (made.lon.min(), made.lon.max()) == pytest.approx((12.50, 12.73), abs=0.05)
    rows = np.array([int(name[1:5]) for name in made.sample])
    columns = np.array([int(name[6:]) for name in made.sample])
    assert np.corrcoef(rows, made.lat)[0, 1] < -0.99
    assert np.corrcoef(columns, made.lon)[0, 1] > 0.99


# Splits


@pytest.mark.parametrize("name", ["sample-landuse", "sample-landuse-seg", "sample-trees", "sample-trees-seg"])
def test_no_chip_reaches_into_another_splits_block(image_dataset, params, name):
    made, chosen = image_dataset(name), params.dataset(name)
    owner = {}
    for sample, split in zip(made.sample, made.split, strict=True):
        scene, place = sample.rsplit("r", 1)
        row, column = (int(value) for value in place.split("c"))
        for corner_row in (row, row + chosen.chip - 1):
            for corner_column in (column, column + chosen.chip - 1):
                block = (scene, corner_row // chosen.block, corner_column // chosen.block)
                assert owner.setdefault(block, split) == split


def test_both_tasks_of_the_scene_share_their_areas(image_dataset):
    """A tile in train whose chips are in test would leak as soon as one model saw both sets."""
    areas = {}
    for name in ("sample-landuse", "sample-landuse-seg"):
        for sample, split in zip(image_dataset(name).sample, image_dataset(name).split, strict=True):
            areas.setdefault((int(sample[1:5]) // 256, int(sample[6:]) // 256), set()).add(split)
    assert all(len(splits) == 1 for splits in areas.values())


def test_unlabelled_is_ignored_and_never_a_class(image_dataset):
    made = image_dataset("sample-landuse-seg")
    assert IGNORE not in range(len(made.classes))
    assert set(np.unique(made.label)) == {*range(len(osm_landuse.CLASSES)), IGNORE}


# Stores and training


@pytest.fixture
def cell(image_dataset, tmp_path):
    """Land use with its bands' means as a backbone; `change` plants the mistake."""
    made = image_dataset("sample-landuse")
    image_writer.write(made, tmp_path / "scratch-images", tmp_path / "images.zarr")
    digest = image_store.open_images(tmp_path / "images.zarr").attrs["content_sha256"]
    means = np.concatenate([made.image.mean((2, 3)), made.image.std((2, 3))], axis=1) / 1000

    def make(name="b", change=lambda features, layout: (features, layout), images_digest=digest):
        layout = StoreSchema(tuple(made.sample), tuple(made.split), (), {"mean": 26}, "float32", 1024)
        features, layout = change(means, layout)
        provenance = {"images_sha256": images_digest}
        writer = Writer(tmp_path / f"scratch-{name}", layout, tmp_path / f"{name}.zarr", provenance)
        writer.write(0, {"pooled/mean": features})
        writer.finish()
        return tmp_path / f"{name}.zarr"

    make.images, make.made = tmp_path / "images.zarr", made
    return make


def load(cell, stores, splits=("train", "val")):
    return task_data.load(dict.fromkeys(stores), cell.images, SMALL, splits, "cpu")


def score(loaded, split="val", seed=0):
    counts = loaded.counts(loaded.train([loop.HParams(1e-2, 1e-4, seed)]), split)
    return Classification(loaded.task.classes).score(counts.sum(1))[0]


def test_misaligned_sample_order_between_stores_is_refused(cell):
    def swap(features, layout):
        order = np.random.default_rng(0).permutation(len(features))
        names = tuple(layout.sample[i] for i in order)
        return features[order], dataclasses.replace(layout, sample=names)

    with pytest.raises(StoreError, match="differ in 'sample'"):
        load(cell, [cell("a"), cell("b", swap)])
    with pytest.raises(StoreError, match="in another order than"):
        load(cell, [cell("b2", swap)])


def test_stores_of_other_images_are_refused(cell):
    with pytest.raises(StoreError, match="made from other images"):
        load(cell, [cell("a"), cell("b", images_digest="0" * 64)])


def test_a_store_that_is_not_the_resolved_one_is_refused(cell):
    path = cell("a")
    with pytest.raises(StoreError, match="is not the store that was resolved"):
        task_data.load({path: "0" * 64}, cell.images, SMALL, ("train",), "cpu")


def test_what_lies_in_the_test_split_changes_nothing_in_the_search(cell):
    def spoil(features, layout):
        features = features.copy()
        features[np.array(layout.split) == "test"] = 1e6
        return features, layout

    clean, spoilt = load(cell, [cell("a")]), load(cell, [cell("b", spoil)])
    for split in ("train", "val"):
        assert torch.equal(clean.splits[split].inputs, spoilt.splits[split].inputs)
    assert score(clean) == score(spoilt)
    assert "test" not in clean.splits


def test_standardisation_comes_from_the_training_split_alone(cell):
    def shift(features, layout):
        features = features.copy()
        features[np.array(layout.split) == "val"] += 100
        return features, layout

    clean, shifted = load(cell, [cell("a")]), load(cell, [cell("b", shift)])
    assert torch.equal(clean.splits["train"].inputs, shifted.splits["train"].inputs)
    assert not torch.equal(clean.splits["val"].inputs, shifted.splits["val"].inputs)


def test_shuffled_features_know_nothing(cell):
    """Rows out of step with labels must fall to the majority's share: real features do not."""

    def shuffle(features, layout):
        return features[np.random.default_rng(0).permutation(len(features))], layout

    label = cell.made.label[np.array(cell.made.split) == "val"]
    majority = np.bincount(label).max() / len(label)
    assert score(load(cell, [cell("a")])) > majority + 0.1
    assert score(load(cell, [cell("b", shuffle)])) < majority + 0.05


def test_labels_are_joined_by_the_stores_order(cell):
    loaded = load(cell, [cell("a")])
    for part in loaded.splits.values():
        expected = [cell.made.label[list(cell.made.sample).index(name)] for name in part.sample]
        assert part.label.tolist() == expected
