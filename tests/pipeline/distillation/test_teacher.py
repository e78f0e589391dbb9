import dataclasses

import numpy as np
import pytest
import torch

from cache.errors import StoreError
from pipeline.data.augmentation import VIEWS
from pipeline.data.image_store import UNLABELLED
from pipeline.distillation import choose_teacher
from pipeline.distillation.teacher import CachedTeacher
from pipeline.errors import UserError
from pipeline.heads import checkpoint
from pipeline.tasks import IGNORE
from tests.errors import raises
from tests.pipeline.distillation.conftest import extract_features


def choose(params, scores, **distill):
    """Choose by validation scores; models without a score are skipped."""
    distill = dataclasses.replace(params.distill, **{"datasets": (), **distill})
    models = ("csmask_b4", "lite0", "csmask_b4+lite0", "raw", "lite0_random")
    params = dataclasses.replace(params, distill=distill, grid=dataclasses.replace(params.grid, models=models))
    skipped = {model: None if model in scores else "no such bands" for model in models}
    return choose_teacher(params, "d", {m: {"skipped": skipped[m], "score": scores.get(m)} for m in models})


@pytest.mark.parametrize(
    ("scores", "changes", "expected"),
    [
        ({"raw": 0.9, "csmask_b4": 0.5, "lite0": 0.6, "csmask_b4+lite0": 0.55, "lite0_random": 0.99}, {}, "lite0"),
        ({"csmask_b4": 0.6, "csmask_b4+lite0": 0.6, "lite0": 0.1}, {}, "csmask_b4+lite0"),  # tie: more members win
        ({"lite0": 0.6, "csmask_b4": 0.7}, {"datasets": ("d",), "teacher": "lite0"}, "lite0"),
    ],
)
def test_choose_teacher_best_is_the_best_pretrained_model_on_validation(params, scores, changes, expected):
    assert choose(params, scores, **changes) == (expected, None)


@pytest.mark.parametrize(
    ("scores", "changes", "mentions"),
    [
        ({"raw": 0.9, "lite0_random": 0.3}, {}, ["pretrained"]),
        ({"lite0": 0.6}, {"datasets": ("e", "f")}, ["distill.datasets", "e, f"]),
        ({"lite0": 0.6}, {"teacher": "csmask_b4+lite0"}, ["csmask_b4+lite0", "no such bands"]),
        ({"lite0_random": 0.3}, {"teacher": "lite0_random"}, ["lite0_random"]),
    ],
    ids=["none is pretrained", "another dataset", "skipped", "random weights"],
)
def test_choose_teacher_without_a_teacher_gives_the_reason(params, scores, changes, mentions):
    teacher, reason = choose(params, scores, **changes)
    assert teacher is None
    assert all(mention in reason for mention in mentions)


@pytest.mark.parametrize("cached_views", [(), ("identity", "rot90")])
def test_cached_teacher_features_are_those_of_the_chips(make_dataset, cached_views):
    """Compare with features extracted from the very chips that a student gets."""
    dataset = make_dataset("segmentation", cached_views)
    setup = dataset.setup()
    rows = setup.images.rows("train", UNLABELLED)[[5, 0, 0, 11]]
    views = ["identity", "rot90", "identity", "rot90"] if cached_views else ["identity"] * 4
    expected = extract_features(setup.images.image_tensor(rows, views).numpy())
    training = extract_features(dataset.pixels[dataset.images.split.values == "train"])
    actual = setup.teacher.features(rows, views)
    for (_, name), values in zip(setup.teacher.arrays, actual, strict=True):
        axes = (0, 2, 3) if training[name].ndim == 4 else (0,)
        mean, std = (np.expand_dims(f(training[name], axis=axes), axes) for f in (np.mean, np.std))
        np.testing.assert_allclose(values.numpy(), (expected[name] - mean) / std, atol=2e-3)
    assert not np.allclose(actual[0][0], actual[0][3], atol=0.1), "the rows must differ, or the test proves nothing"


def test_cached_teacher_logits_are_the_heads_and_follow_the_views(make_dataset):
    dataset = make_dataset("segmentation")
    setup, head = dataset.setup(), checkpoint.load(dataset.head_path)
    rows, views = setup.images.rows("train", UNLABELLED)[:8], list(VIEWS)
    features = {name: torch.from_numpy(values[rows]) for name, values in extract_features(dataset.pixels).items()}
    upright = head.logits([features]).detach().numpy()
    logits = setup.teacher.logits(rows, views).numpy()
    for view, actual, expected in zip(views, logits, upright, strict=True):
        np.testing.assert_allclose(actual, VIEWS[view](expected), atol=0.02, rtol=2e-3)
    label = setup.images.label_tensor(rows, views).numpy()
    assert (logits.argmax(axis=1) == label)[label != IGNORE].mean() > 0.6, "the head must know its task"
    assert setup.teacher.has_cached_view(views).tolist() == [True] + [False] * 7


def test_cached_teacher_logits_of_a_cached_view_are_computed_from_its_features(make_dataset):
    dataset = make_dataset("segmentation", ("identity", "rot90"))
    setup, head = dataset.setup(), checkpoint.load(dataset.head_path)
    rows = setup.images.rows("train")[:2]
    rotated = extract_features(np.ascontiguousarray(np.rot90(dataset.pixels[rows], 1, axes=(-2, -1))))
    expected = head.logits([{name: torch.from_numpy(values) for name, values in rotated.items()}]).detach()
    torch.testing.assert_close(setup.teacher.logits(rows, ["rot90"] * 2), expected, atol=0.02, rtol=2e-3)
    assert setup.teacher.has_cached_view(["identity", "rot90", "flip_x"]).tolist() == [True, True, False]


def test_cached_teacher_wrong_stores_are_refused(make_dataset, tmp_path):
    dataset, missing = make_dataset("classification"), tmp_path / "d/nothing.zarr"
    head, other = checkpoint.load(dataset.head_path), make_dataset("segmentation").store
    for path, digest in ((missing, None), (dataset.store, "another digest"), (other, None)):
        with raises(StoreError, path):
            CachedTeacher({path: digest}, dataset.images_path, head, np.arange(2))


@pytest.mark.parametrize(("field", "value"), [("class_names", ("x", "y", "z")), ("model", "lite0")])
def test_cached_teacher_head_of_other_classes_or_members_is_refused(make_dataset, field, value):
    dataset = make_dataset("classification")
    head = dataclasses.replace(checkpoint.load(dataset.head_path), **{field: value})
    with raises(UserError, "a, b, c", key="head", value=head.model, allowed=["member"]):
        CachedTeacher({dataset.store: None}, dataset.images_path, head, np.arange(2))
