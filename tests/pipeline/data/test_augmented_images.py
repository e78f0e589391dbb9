import numpy as np
import pytest

from pipeline.data import image_store
from pipeline.data.augmentation import VIEWS
from pipeline.distillation.chips import Chips


def test_a_mask_turns_with_its_chip(made):
    one = made("segmentation")
    chips, rows, views = Chips(one.pictures, 1.0), np.arange(8), list(VIEWS)
    image, label = chips.image(rows, views).numpy(), chips.label(rows, views).numpy()
    seen = label != image_store.IGNORE
    assert seen.mean() == pytest.approx(28 / 32)
    # The first band is a hundred times the class, give or take.
    assert (np.round(image[:, 0] / 100).clip(0, 2) == label)[seen].mean() > 0.99
    assert not (label == chips.label(rows).numpy()).all(), "they were turned at all"


def test_in_memory_and_from_the_disk_are_the_same(made):
    one, rows = made("segmentation"), np.array([7, 3, 3, 20])
    held, read = Chips(one.pictures, 1.0), Chips(one.pictures, 0.0)
    views = ["rot90", "identity", "flip_x", "flip_y"]
    assert (held.image(rows, views) == read.image(rows, views)).all()
    assert (held.label(rows, views) == read.label(rows, views)).all()
    np.testing.assert_array_equal(held.image(rows).numpy(), one.image[rows])


def test_statistics_are_of_the_training_split_alone(made):
    one = made("classification")
    chips = Chips(one.pictures, 1.0)
    train = one.image[chips.split == "train"].astype(np.float64)
    np.testing.assert_allclose(chips.mean, train.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(chips.std, train.std(axis=(0, 2, 3)), rtol=1e-4)
    assert abs(chips.mean[1] - one.image[:, 1].mean()) > 0.1, "or this test could not tell"


def test_chips_that_are_not_square_are_only_flipped(open_images):
    from tests.pipeline.distillation.conftest import pixels

    image, _ = pixels()
    from pipeline.bands import Band

    like = open_images(
        image_store.ImageDataset(
            image=image[:6, :, :16], label=np.zeros(6, int), sample=list("abcdef"),
            split=["train", "val", "test"] * 2, bands=[Band("B1", "red", 0.6, 1.0), Band("B2", "nir", 0.8, 1.0)],
            classes=["a"], task="classification", units="dn", gsd=1.0, licence="none", source="made",
        )
    )  # fmt: skip
    chips = Chips(like.encoding["source"], 1.0)
    assert chips.image(np.arange(4), list(chips.views)).shape == (4, 2, 16, 32)
