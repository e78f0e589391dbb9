"""Training: what each variant sees, and that a student learns from a teacher what its labels do not say."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from pipeline.distillation.describe import make_spec, student_metadata

from pipeline.config import StudentConfig
from pipeline.data import image_store
from pipeline.distillation import losses, protocol, start, train
from pipeline.errors import UserError
from pipeline.tasks import get_task
from pipeline.training.loop import HParams
from tests.pipeline.distillation.conftest import DISTILL

SMALL = StudentConfig("test_resnet", "random", chip_size=32, mask_size=32)
SETTING = HParams(0.01, 0.01, 0)


def fresh(lesson, seed=0):
    chips = lesson.images
    return start.make_student(make_spec(chips.images, SMALL), chips.mean, chips.std, None, seed)


def trained(lesson, variant, setting=SETTING):
    student = fresh(lesson, setting.seed)
    ends = train.make_projectors(student, lesson, setting.seed) if variant in ("distilled", "features") else None
    return train.train(student, ends, lesson, variant, setting), ends


class Silent:
    """A teacher that must not be asked."""

    def __init__(self, views, maps, shapes):
        self.views, self.maps, self.shapes = views, maps, shapes

    def __getattr__(self, name):
        raise AssertionError(f"the control asked its teacher for {name}")


def test_labels_alone_never_ask_a_teacher_and_start_and_turn_alike(made):
    lesson = made("classification").lesson()
    teacher = Silent(lesson.teacher.views, lesson.teacher.maps, lesson.teacher.shapes)
    alone = dataclasses.replace(lesson, teacher=teacher)
    one, two = (trained(each, "supervised")[0] for each in (lesson, alone))
    for ours, theirs in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(AssertionError, match="asked its teacher for logits"):
        trained(alone, "logits")


def test_a_student_from_labels_learns_the_task(made):
    lesson = made("classification").lesson()
    scores = protocol._scores([fresh(lesson), trained(lesson, "supervised")[0]], lesson, "val")
    assert scores[1] > max(scores[0], 0.6)


def test_features_are_learned_in_their_places_and_projectors_stay_behind(made):
    """Only if rows, views and grids of image and teacher agree can the validation's features be foretold."""
    longer = dataclasses.replace(DISTILL, segmentation=dataclasses.replace(DISTILL.segmentation, steps=60))
    lesson = made("segmentation").lesson(longer)
    student, projectors = trained(lesson, "features")
    untaught, blank = fresh(lesson), train.make_projectors(fresh(lesson), lesson, 0)
    rows = lesson.images.rows("val")
    wanted = lesson.teacher.features(rows, ["identity"] * len(rows))

    def apart(one, ends, wanted):
        with torch.inference_mode():
            said = ends(one.eval().levels(lesson.images.image_tensor(rows)))
        return losses.feature_loss(said[0], wanted[0]).mean()

    assert apart(student, projectors, wanted) < 0.6 * apart(untaught, blank, wanted)
    shifted = [array.roll(1, dims=0) for array in wanted]
    assert apart(student, projectors, wanted) < 0.8 * apart(student, projectors, shifted), "rows"
    flipped = [array.flip(-1) if array.ndim == 4 else array for array in wanted]
    assert apart(student, projectors, wanted) < 0.8 * apart(student, projectors, flipped), "views"
    assert not any("maps" in name for name in student.state_dict()), "no projector is part of the student"


def test_the_teachers_answers_reach_pixels_without_labels(made):
    """The labels of the left eighth are withheld; the class there is known from the teacher alone."""
    lesson = made("segmentation").lesson()
    rows = lesson.images.rows("train")[:8]
    student, said = fresh(lesson), {}
    image = lesson.images.image_tensor(rows)
    for variant in ("supervised", "logits"):
        student.zero_grad()
        out = student(image).detach().requires_grad_()
        stub = dataclasses.replace(lesson)
        student.levels, student.logits = lambda _: None, lambda *_, out=out: out
        train._loss(student, None, stub, variant, rows, ["identity"] * 8).backward()
        del student.levels, student.logits
        said[variant] = out.grad[..., :4].abs().sum()
    assert said["supervised"] == 0
    assert said["logits"] > 0


def test_chips_without_labels_join_where_there_is_a_teacher(made):
    lesson = made("classification", split=("train", "val", "test", "unlabelled")).lesson()
    assert set(lesson.images.split[lesson.rows("distilled")]) == {"train", "unlabelled"}
    assert set(lesson.images.split[lesson.rows("supervised")]) == {"train"}
    rows = lesson.images.rows("unlabelled")[:8]
    student = fresh(lesson)
    torch.manual_seed(0)
    one = train._loss(student, None, lesson, "logits", rows, ["identity"] * 8)
    lesson.images._label = (lesson.images._label + 1) % 3
    two = train._loss(student, None, lesson, "logits", rows, ["identity"] * 8)
    torch.testing.assert_close(one, two)  # what stands in their label's place is not used
    assert trained(lesson, "distilled")[0] is not None


def test_maps_of_chips_turned_otherwise_do_not_count(made):
    lesson = made("segmentation").lesson()
    rows = lesson.images.rows("train")[:2]
    said = [torch.randn(2, *shape) for shape in lesson.teacher.shapes]
    wanted = [torch.randn(2, *shape) for shape in lesson.teacher.shapes]
    matched = lesson.teacher.matched(["identity", "rot90"])
    one = train._feature_loss(said, wanted, matched, lesson.teacher)
    wanted[0][1] += 5  # the map of the turned chip
    assert train._feature_loss(said, wanted, matched, lesson.teacher) == one
    wanted[1][1] += 5  # its pooled vector, which does count
    assert train._feature_loss(said, wanted, matched, lesson.teacher) != one
    assert len(rows) == 2


def test_views_are_the_cached_ones_or_half_upright(made):
    lesson = made("segmentation").lesson()
    drawn = train.draw_views(lesson, 400, np.random.default_rng(0))
    assert 0.45 < drawn.count("identity") / 400 < 0.65
    assert len(set(drawn)) == 8
    lesson.teacher.views = ["identity", "flip_y"]
    assert set(train.draw_views(lesson, 100, np.random.default_rng(0))) == {"identity", "flip_y"}
    lesson.teacher.views, lesson.teacher.maps = ["identity"], 0
    assert train.draw_views(lesson, 400, np.random.default_rng(0)).count("identity") < 100


@pytest.mark.parametrize("task", ["classification", "multilabel", "segmentation"])
def test_the_protocol_on_every_task(made, tmp_path, task):
    short = dataclasses.replace(DISTILL, classification=dataclasses.replace(DISTILL.classification, steps=6),
                                segmentation=dataclasses.replace(DISTILL.segmentation, steps=3))  # fmt: skip
    lesson = made(task).lesson(short)
    told = {"dataset": "d", "model": "s (distilled)", "weights": "random"}
    taught = protocol.train_variant(lambda seed: fresh(lesson, seed), lesson, "distilled", told, tmp_path / "study", 1)
    assert len(taught.tuned["trials"]) == 2
    assert set(taught.runs.protocol) == {"distilled"}
    assert taught.runs.seed.tolist() == [0, 1]
    assert taught.seed == taught.runs.val_score.idxmax()
    names = lesson.images.sample[lesson.images.rows("test")].tolist()
    assert taught.predicted[taught.predicted.seed == 0]["sample"].tolist() == names
    assert protocol._scores([taught.best], lesson, "test")[0] == pytest.approx(taught.runs.score[taught.seed])
    again = protocol.train_variant(lambda seed: fresh(lesson, seed), lesson, "distilled", told, tmp_path / "other", 1)
    pd.testing.assert_frame_equal(taught.runs, again.runs)
    kept = student_metadata(lesson.images.images, "d", "distilled", "random", "member")
    assert kept["ignore"] == (image_store.IGNORE if task == "segmentation" else None)
    assert [band["common_name"] for band in kept["bands"]] == ["red", "nir"]
    assert get_task(task).metric == taught.runs.metric[0]


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_students_that_diverged_are_no_score_and_are_not_chosen(made, monkeypatch, tmp_path, task):
    lesson = made(task).lesson()
    told, real = {"dataset": "d", "model": "small"}, protocol._train_students

    def some(*given):
        students = real(*given)
        next(students[-1].parameters()).data.fill_(float("nan"))
        return students

    monkeypatch.setattr(protocol, "_trained", some)
    with pytest.raises(UserError, match="with 1 of 2 seeds .*distill.search.learning_rate"):
        protocol.train_variant(lambda seed: fresh(lesson, seed), lesson, "supervised", told, tmp_path / "study", "")
    trials = json.loads((tmp_path / "study").read_text())["trials"]
    assert [trial.get("diverged", False) for trial in trials] == [False, True]
