import dataclasses
import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.config import StudentConfig
from pipeline.distillation import losses, train
from pipeline.distillation.student import make_spec, make_student
from pipeline.errors import UserError
from pipeline.training.loop import HParams
from tests.errors import raises
from tests.pipeline.distillation.conftest import DISTILL

SMALL = StudentConfig("test_resnet", "random", chip_size=32, mask_size=32)
HPARAMS = HParams(0.01, 0.01, 0)
METADATA = {"dataset": "d", "model": "s (distilled)", "weights": "random"}


def create_student(setup, seed=0):
    images = setup.images
    return make_student(make_spec(images.images, SMALL), images.mean, images.std, None, seed)


def train_student(setup, variant, hparams=HPARAMS):
    """A trained student and its projectors, None for variants without features."""
    student, has_projectors = create_student(setup, hparams.seed), variant in ("distilled", "features")
    projectors = train.make_projectors(student, setup, hparams.seed) if has_projectors else None
    return train.train(student, projectors, setup, variant, hparams), projectors


def with_steps(n_steps):
    steps = dataclasses.replace(DISTILL.segmentation, steps=n_steps)
    return dataclasses.replace(DISTILL, classification=dataclasses.replace(steps, batch=16), segmentation=steps)


def test_train_supervised_learns_and_never_uses_the_teacher(make_dataset):
    setup = make_dataset("classification").setup()
    del setup.teacher._logits, setup.teacher.members  # of features
    untrained, trained = train._scores([create_student(setup), train_student(setup, "supervised")[0]], setup, "val")
    assert trained > max(untrained, 0.6)
    with raises(AttributeError, "_logits"):
        train_student(setup, "logits")


def test_train_features_predicts_features_of_the_right_rows_and_views(make_dataset):
    """Validation features can be predicted only if rows, views and grids of image and teacher agree."""
    setup = make_dataset("segmentation").setup(with_steps(50))
    student, projectors = train_student(setup, "features")
    untrained = create_student(setup)
    untrained_projectors = train.make_projectors(untrained, setup, 0)
    rows = setup.images.rows("val")
    targets = setup.teacher.features(rows, ["identity"] * len(rows))

    def mean_loss(student, projectors, targets):
        with torch.inference_mode():
            predictions = projectors(student.eval().levels(setup.images.image_tensor(rows)))
        return losses.feature_loss(predictions[0], targets[0]).mean()

    loss = mean_loss(student, projectors, targets)
    assert loss < 0.6 * mean_loss(untrained, untrained_projectors, targets)
    wrong_rows = [array.roll(1, dims=0) for array in targets]
    assert loss < 0.8 * mean_loss(student, projectors, wrong_rows)
    wrong_views = [array.flip(-1) if array.ndim == 4 else array for array in targets]
    assert loss < 0.8 * mean_loss(student, projectors, wrong_views)
    assert not any("maps" in name for name in student.state_dict()), "projectors are not part of the student"


def test_loss_teacher_logits_reach_pixels_without_labels(make_dataset):
    """The left eighth of the masks has no labels; only the teacher has a gradient there."""
    setup = make_dataset("segmentation").setup()
    rows = setup.images.rows("train")[:8]
    student, gradients = create_student(setup), {}
    chips = setup.images.image_tensor(rows)
    for variant in ("supervised", "logits"):
        logits = student(chips).detach().requires_grad_()
        student.levels, student.logits = lambda _: None, lambda *_, logits=logits: logits
        train._loss(student, None, setup, variant, rows, ["identity"] * 8).backward()
        del student.levels, student.logits
        gradients[variant] = logits.grad[..., :4].abs().sum()
    assert gradients["supervised"] == 0
    assert gradients["logits"] > 0


def test_loss_placeholder_of_a_missing_label_is_not_used(make_dataset):
    setup = make_dataset("classification", split=("train", "val", "test", "unlabelled")).setup()
    rows, student = setup.images.rows("unlabelled")[:8], create_student(setup)
    loss = train._loss(student, None, setup, "logits", rows, ["identity"] * 8)
    setup.images._label = (setup.images._label + 1) % 3
    torch.testing.assert_close(loss, train._loss(student, None, setup, "logits", rows, ["identity"] * 8))


def test_feature_loss_maps_of_uncached_views_do_not_count(make_dataset):
    teacher = make_dataset("segmentation").setup().teacher
    predictions, targets = ([torch.randn(2, *shape) for shape in teacher.shapes] for _ in range(2))
    has_maps = teacher.has_cached_view(["identity", "rot90"])
    loss = train._feature_loss(predictions, targets, has_maps, teacher)
    targets[0][1] += 5  # the map of the rotated chip
    assert train._feature_loss(predictions, targets, has_maps, teacher) == loss
    targets[1][1] += 5  # its pooled vector, which counts
    assert train._feature_loss(predictions, targets, has_maps, teacher) != loss


def test_draw_views_are_cached_ones_or_half_upright(make_dataset):
    setup = make_dataset("segmentation").setup()
    views = train.draw_views(setup, 400, np.random.default_rng(0))
    assert 0.45 < views.count("identity") / 400 < 0.65
    assert len(set(views)) == 8
    setup.teacher.views = ["identity", "flip_y"]
    assert set(train.draw_views(setup, 100, np.random.default_rng(0))) == {"identity", "flip_y"}
    setup.teacher.views, setup.teacher.n_maps = ["identity"], 0
    assert train.draw_views(setup, 400, np.random.default_rng(0)).count("identity") < 100


@pytest.mark.parametrize("task", ["classification", "multilabel", "segmentation"])
def test_train_variant_runs_predictions_and_best_student_agree(make_dataset, tmp_path, task):
    setup = make_dataset(task).setup(with_steps(3))
    arguments = (partial(create_student, setup), setup, "distilled", METADATA)
    search_result, result = train.train_variant(*arguments, tmp_path / "study", 1)
    runs, predicted, best = result.runs, result.predicted, result.best_index
    assert len(search_result["trials"]) == 2
    assert set(runs.protocol) == {"distilled"}
    assert set(runs.metric) == {setup.task.metric}
    assert runs.seed.tolist() == [0, 1]
    assert best == runs.val_score.idxmax()
    samples = setup.images.sample[setup.images.rows("test")].tolist()
    assert predicted[predicted.seed == 0]["sample"].tolist() == samples
    assert train._scores([result.group[best]], setup, "test")[0] == pytest.approx(runs.score[best])
    if task == "segmentation":
        pd.testing.assert_frame_equal(runs, train.train_variant(*arguments, tmp_path / "other", 1)[1].runs)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_train_variant_diverged_students_have_no_score_and_are_refused(make_dataset, monkeypatch, tmp_path, task):
    setup, train_students = make_dataset(task).setup(with_steps(1)), train._train_students

    def last_diverges(*arguments):
        students = train_students(*arguments)
        next(students[-1].parameters()).data.fill_(float("nan"))
        return students

    monkeypatch.setattr(train, "_train_students", last_diverges)
    with raises(UserError, "1 of 2", key=train.SEARCH_KEYS):
        train.train_variant(partial(create_student, setup), setup, "supervised", METADATA, tmp_path / "study", 1)
    trials = json.loads((tmp_path / "study").read_text())["trials"]
    assert [trial.get("diverged", False) for trial in trials] == [False, True]
