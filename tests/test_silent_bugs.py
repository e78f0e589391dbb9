"""Mistakes that make scores wrong without an error: each is made on purpose and must be noticed."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn import metrics

from cache.errors import StoreError
from cache.schema import StoreSchema
from cache.writer import Writer
from pipeline.bands import Band
from pipeline.config import HeadsConfig, LinearHeadConfig, UPerNetHeadConfig
from pipeline.data import image_store, image_writer
from pipeline.data.sources import osm_landuse
from pipeline.tasks import IGNORE, Segmentation
from pipeline.training import task_data
from pipeline.training.loop import HParams
from pipeline.training.protocol import count_split, train_heads
from tests.errors import raises

HEADS = HeadsConfig(
    LinearHeadConfig("all", "mean", steps=200, batch=64), UPerNetHeadConfig(channels=8, steps=5, batch=4)
)


@pytest.fixture
def demo_encoder(open_images, make_encoder, weights_folder):
    """Function from a dataset in memory and a variant to the encoder of a demo backbone."""
    return lambda dataset, variant: make_encoder(
        open_images(dataset), "efficientnet", variant, folder=weights_folder(variant)
    )


# Bands and units


@pytest.mark.parametrize("variant", ["csmask_b4", "lite0"])
def test_encoder_bands_in_another_order_in_the_store_give_equal_inputs(image_dataset, demo_encoder, variant):
    dataset = image_dataset("sample-landuse")
    order = np.random.default_rng(0).permutation(13)
    shuffled = dataclasses.replace(dataset, image=dataset.image[:, order], bands=[dataset.bands[i] for i in order])
    expected = demo_encoder(dataset, variant).prepare(dataset.image[:3])
    assert torch.equal(demo_encoder(shuffled, variant).prepare(shuffled.image[:3]), expected)


def test_encoder_wrong_band_order_changes_the_features(image_dataset, demo_encoder):
    dataset = image_dataset("sample-landuse")
    encoder = demo_encoder(dataset, "lite0")
    correct, reversed_bands = encoder(dataset.image[:3]), encoder(dataset.image[:3, ::-1])
    assert np.abs(correct.pooled["mean_level3"] - reversed_bands.pooled["mean_level3"]).max() > 0.1


def test_encoder_rgb_is_not_bgr(image_dataset, demo_encoder):
    dataset = image_dataset("sample-trees")
    inputs = demo_encoder(dataset, "lite0").prepare(dataset.image[:1])
    assert dataset.bands[0] == Band("R", "red", 0.665, 0.1)
    expected = dataset.image[0].astype(np.float32).mean(axis=(1, 2)) / 255
    np.testing.assert_allclose(inputs[0].mean(dim=(1, 2)) * 0.502 + 0.498, expected, atol=1e-4)


@pytest.mark.parametrize("variant", ["csmask_b4", "lite0"])
def test_encoder_dn_and_reflectance_of_one_scene_give_equal_inputs(image_dataset, demo_encoder, variant):
    dataset = image_dataset("sample-landuse")
    reflectance = dataset.image.astype(np.float32) / 10000
    scaled = dataclasses.replace(dataset, image=reflectance, units="reflectance")
    actual, expected = (demo_encoder(images, variant).prepare(images.image[:3]) for images in (scaled, dataset))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_encoder_reflectance_declared_as_dn_changes_the_inputs(image_dataset, demo_encoder):
    dataset = image_dataset("sample-landuse")
    mislabelled = dataclasses.replace(dataset, image=dataset.image.astype(np.float32) / 10000)  # units are still DN
    actual, expected = (
        demo_encoder(images, "csmask_b4").prepare(images.image[:3]) for images in (mislabelled, dataset)
    )
    assert (actual - expected).abs().mean() > 0.3


# Location


def test_prepare_does_not_swap_latitude_and_longitude(image_dataset):
    dataset = image_dataset("sample-landuse")
    # The scene lies west of Berlin; rows run south, columns east.
    assert (dataset.lat.min(), dataset.lat.max()) == pytest.approx((52.45, 52.52), abs=0.05)
    assert (dataset.lon.min(), dataset.lon.max()) == pytest.approx((12.50, 12.73), abs=0.05)
    rows = np.array([int(name[1:5]) for name in dataset.sample])
    columns = np.array([int(name[6:]) for name in dataset.sample])
    assert np.corrcoef(rows, dataset.lat)[0, 1] < -0.99
    assert np.corrcoef(columns, dataset.lon)[0, 1] > 0.99


# Splits


@pytest.mark.parametrize("name", ["sample-landuse", "sample-landuse-seg", "sample-trees", "sample-trees-seg"])
def test_splits_no_chip_overlaps_a_block_of_another_split(image_dataset, params, name):
    dataset, config = image_dataset(name), params.dataset(name)
    split_of_block = {}
    for sample, split in zip(dataset.sample, dataset.split, strict=True):
        scene, position = sample.rsplit("r", 1)
        row, column = (int(value) for value in position.split("c"))
        for corner_row in (row, row + config.chip - 1):
            for corner_column in (column, column + config.chip - 1):
                block = (scene, corner_row // config.block, corner_column // config.block)
                assert split_of_block.setdefault(block, split) == split


def test_splits_both_tasks_of_a_scene_have_equal_areas(image_dataset):
    """A block in train of one task and in test of the other would leak to a model that is trained on both."""
    splits_of_block = {}
    for name in ("sample-landuse", "sample-landuse-seg"):
        dataset = image_dataset(name)
        for sample, split in zip(dataset.sample, dataset.split, strict=True):
            splits_of_block.setdefault((int(sample[1:5]) // 256, int(sample[6:]) // 256), set()).add(split)
    assert all(len(splits) == 1 for splits in splits_of_block.values())


def test_masks_unlabelled_pixels_are_ignored_and_never_a_class(image_dataset):
    dataset = image_dataset("sample-landuse-seg")
    assert IGNORE not in range(len(dataset.classes))
    assert set(np.unique(dataset.label)) == {*range(len(osm_landuse.CLASSES)), IGNORE}


# Scores


@pytest.mark.parametrize(
    ("metric", "reference"),
    [
        ("mean IoU", lambda *pair: metrics.jaccard_score(*pair, average="macro", labels=[0, 1])),
        ("macro F1", lambda *pair: metrics.f1_score(*pair, average="macro", labels=[0, 1])),
        ("balanced accuracy", lambda *pair: metrics.recall_score(*pair, average="macro", labels=[0, 1])),
    ],
)
def test_score_one_pixel_of_a_class_that_the_labels_lack_does_not_take_a_third(metric, reference):
    label = np.arange(10_000).reshape(1, 100, 100) % 2
    predicted = label.copy()
    predicted[0, 0, 0] = 2
    task = Segmentation(3)
    score = task.score(task.counts(predicted, label).sum(0), metric)
    assert score == pytest.approx(reference(label.ravel(), predicted.ravel()))
    assert 0.9998 < score < 1


# Stores and training


@pytest.fixture(scope="module")
def landuse(image_dataset, tmp_path_factory):
    """The land use dataset in memory, and the path of its images store."""
    folder, dataset = tmp_path_factory.mktemp("landuse"), image_dataset("sample-landuse")
    image_writer.write(dataset, folder / "scratch", folder / "images.zarr")
    return dataset, folder / "images.zarr"


@pytest.fixture
def write_features(landuse, tmp_path):
    """Function from a name to a feature store of the bands' statistics; `change` makes the mistake."""
    dataset, images_path = landuse
    content_sha256 = image_store.open_images(images_path).attrs["content_sha256"]
    stats = np.concatenate([dataset.image.mean((2, 3)), dataset.image.std((2, 3))], axis=1) / 1000

    def write(name, change=None, images_sha256=content_sha256):
        schema = StoreSchema(tuple(dataset.sample), tuple(dataset.split), (), {"mean": 26}, "float32", 1024)
        features, schema = change(stats, schema) if change else (stats, schema)
        provenance = {"images_sha256": images_sha256}
        writer = Writer(tmp_path / f"scratch-{name}", schema, tmp_path / f"{name}.zarr", provenance)
        writer.write(0, {"pooled/mean": features})
        writer.finish()
        return tmp_path / f"{name}.zarr"

    return write


@pytest.fixture
def load(landuse):
    """Function from paths of feature stores to the features and labels of two splits."""
    _, images_path = landuse

    def load_stores(*stores):
        return task_data.load(dict.fromkeys(stores), images_path, HEADS, ("train", "val"), "cpu")

    return load_stores


def val_score(data):
    """Validation score of a head with one seed."""
    counts = count_split(data, train_heads(data, [HParams(1e-2, 1e-4, 0)]), "val")
    return data.task.score(counts.sum(1))[0]


def shuffle_samples(features, schema):
    order = np.random.default_rng(0).permutation(len(features))
    return features[order], dataclasses.replace(schema, sample=tuple(schema.sample[i] for i in order))


def test_load_stores_with_different_sample_orders_are_refused(write_features, load):
    with raises(StoreError, key="sample"):
        load(write_features("a"), write_features("b", shuffle_samples))


def test_load_store_with_another_sample_order_than_its_images_is_refused(write_features, load):
    path = write_features("a", shuffle_samples)
    with raises(StoreError, key="sample", path=path):
        load(path)


def test_load_store_of_other_images_is_refused(write_features, load):
    path = write_features("b", images_sha256="0" * 64)
    with raises(StoreError, key="images_sha256", path=path):
        load(write_features("a"), path)


def test_load_store_with_another_digest_than_the_resolved_one_is_refused(write_features, landuse):
    path, (_, images_path) = write_features("a"), landuse
    with raises(StoreError, key="content_sha256", path=path):
        task_data.load({path: "0" * 64}, images_path, HEADS, ("train",), "cpu")


def test_load_and_search_do_not_depend_on_the_test_split(write_features, load):
    def change_test(features, schema):
        features = features.copy()
        features[np.array(schema.split) == "test"] = 1e6
        return features, schema

    expected, actual = load(write_features("a")), load(write_features("b", change_test))
    for split in ("train", "val"):
        assert torch.equal(expected.splits[split].inputs, actual.splits[split].inputs)
    assert val_score(expected) == val_score(actual)
    assert "test" not in expected.splits


def test_load_standardizes_with_the_training_split_only(write_features, load):
    def shift_val(features, schema):
        features = features.copy()
        features[np.array(schema.split) == "val"] += 100
        return features, schema

    original, shifted = load(write_features("a")), load(write_features("b", shift_val))
    assert torch.equal(original.splits["train"].inputs, shifted.splits["train"].inputs)
    assert not torch.equal(original.splits["val"].inputs, shifted.splits["val"].inputs)


def test_train_shuffled_features_score_like_the_majority_class(write_features, load, landuse):
    """Features whose rows do not match the labels must not beat the majority class; others must."""

    def shuffle_features(features, schema):
        return features[np.random.default_rng(0).permutation(len(features))], schema

    dataset, _ = landuse
    label = dataset.label[np.array(dataset.split) == "val"]
    majority = np.bincount(label).max() / len(label)
    assert val_score(load(write_features("a"))) > majority + 0.1
    assert val_score(load(write_features("b", shuffle_features))) < majority + 0.05


def test_load_joins_labels_in_the_order_of_the_store(write_features, load, landuse):
    dataset, _ = landuse
    for split in load(write_features("a")).splits.values():
        expected = [dataset.label[list(dataset.sample).index(name)] for name in split.sample]
        assert split.label.tolist() == expected
