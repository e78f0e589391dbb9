"""The teacher is its cache: rows, views and statistics in their places, and refusals."""

import dataclasses

import numpy as np
import pytest
import torch

from cache.errors import StoreError
from pipeline.data.augmentation import VIEWS, AugmentedImages
from pipeline.data.image_store import UNLABELLED
from pipeline.distillation.teacher import CachedTeacher
from pipeline.errors import UserError
from pipeline.heads import checkpoint
from tests.pipeline.distillation.conftest import features_of

ROWS = np.array([40, 3, 3, 21, 16])


@pytest.mark.parametrize("views", [(), ("identity", "rot90")])
def test_rows_are_those_of_the_chips(made, views):
    """Features made anew from the student's very chips: a row or a view out of place would show."""
    one = made("segmentation", views)
    lesson = one.lesson()
    rows = lesson.images.rows("train", UNLABELLED)[[5, 0, 0, 11]]
    turned = ["identity", "rot90", "identity", "rot90"] if views else ["identity"] * 4
    anew = features_of(lesson.images.image_tensor(rows, turned).numpy())
    training = features_of(one.image[one.like.split.values == "train"])
    given = lesson.teacher.features(rows, turned)
    for (_, name), values in zip(lesson.teacher.fields, given, strict=True):
        axes = (0, 2, 3) if training[name].ndim == 4 else (0,)
        by = [np.expand_dims(f(training[name], axis=axes), axes) for f in (np.mean, np.std)]
        np.testing.assert_allclose(values.numpy(), (anew[name] - by[0]) / by[1], atol=2e-3)
    assert not np.allclose(given[0][0], given[0][3], atol=0.1), "rows differ, or this test could not tell"


def test_other_splits_do_not_move_the_statistics(made):
    """Standardised training features have mean 0 and spread 1; by all rows' statistics they would not."""
    lesson = made("classification").lesson()
    rows = lesson.images.rows("train")
    for values in lesson.teacher.features(rows, ["identity"] * len(rows)):
        axes = (0, 2, 3) if values.ndim == 4 else (0,)
        torch.testing.assert_close(values.mean(dim=axes), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(values.std(dim=axes, correction=0), torch.ones(3), atol=1e-3, rtol=0)


def test_answers_are_the_heads_and_turn_with_the_ground(made):
    one = made("segmentation")
    lesson, head = one.lesson(), checkpoint.load(one.head())
    rows, views = lesson.images.rows("train", UNLABELLED)[:8], list(VIEWS)
    given = {name: torch.from_numpy(value[rows]) for name, value in features_of(one.image).items()}
    upright = head.logits([given]).detach().numpy()
    said = lesson.teacher.logits(rows, views).numpy()
    for view, ours, theirs in zip(views, said, upright, strict=True):
        np.testing.assert_allclose(ours, VIEWS[view](theirs), atol=0.02, rtol=2e-3)
    label = lesson.images.label_tensor(rows, views).numpy()
    assert (said.argmax(axis=1) == label)[label != 255].mean() > 0.6, "the head knows its task"
    assert lesson.teacher.matched(views).tolist() == [True] + [False] * 7


def test_a_cached_view_has_answers_of_its_own(made):
    one = made("segmentation", ("identity", "rot90"))
    lesson, head = one.lesson(), checkpoint.load(one.head())
    rows = lesson.images.rows("train", UNLABELLED)[:2]
    turned = features_of(np.ascontiguousarray(np.rot90(one.image[rows], 1, axes=(-2, -1))))
    wanted = head.logits([{name: torch.from_numpy(value) for name, value in turned.items()}]).detach()
    torch.testing.assert_close(lesson.teacher.logits(rows, ["rot90"] * 2), wanted, atol=0.02, rtol=2e-3)
    assert lesson.teacher.matched(["identity", "rot90", "flip_x"]).tolist() == [True, True, False]


def test_stores_that_are_missing_or_of_another_data_set_are_refused(made, tmp_path, open_images):
    one = made("classification")
    chips, head = AugmentedImages.load(one.pictures, 1.0), checkpoint.load(one.head())
    with pytest.raises(StoreError, match="no feature store"):
        CachedTeacher({tmp_path / "d/nothing.zarr": None}, one.pictures, head, chips.rows("train", UNLABELLED))
    with pytest.raises(StoreError, match="not the store that was resolved"):
        CachedTeacher({one.store: "another digest"}, one.pictures, head, chips.rows("train", UNLABELLED))
    other = type(one)(tmp_path, open_images, "segmentation", one.like.split.values.tolist(), name="other")
    with pytest.raises(StoreError, match="made from other images"):
        CachedTeacher({other.store: None}, one.pictures, head, chips.rows("train", UNLABELLED))
    with pytest.raises(UserError, match="the stores are of member for a, b, c"):
        CachedTeacher(
            {one.store: None}, one.pictures, dataclasses.replace(head, classes=("x", "y", "z")), chips.rows("train", UNLABELLED)
        )
    with pytest.raises(UserError, match="trained head is of lite0"):
        CachedTeacher({one.store: None}, one.pictures, dataclasses.replace(head, model="lite0"), chips.rows("train", UNLABELLED))
