"""Unlabelled images: heads and probes ignore them, and distilled students learn from them."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.composition import probes
from pipeline.composition import search as composition
from pipeline.config import CompositionConfig
from pipeline.data.image_store import UNLABELLED
from pipeline.distillation import train
from pipeline.tasks import NO_CLASS, Classification
from pipeline.training import protocol, task_data
from pipeline.training.loop import HParams
from tests.pipeline.distillation.conftest import HEADS
from tests.pipeline.distillation.test_train import create_student, with_steps

LABELLED = ("train", "val", "train", "test", "train", "train") * 8
HPARAMS = {"learning_rate": 0.02, "weight_decay": 0.01}


@pytest.mark.parametrize("task", ["classification", "multilabel", "segmentation"])
def test_unlabelled_images_change_no_score_of_heads_and_compositions(make_dataset, task):
    heads = dataclasses.replace(
        HEADS, linear=dataclasses.replace(HEADS.linear, steps=5), upernet=dataclasses.replace(HEADS.upernet, steps=1)
    )
    heads = heads if task == "multilabel" else dataclasses.replace(heads, class_weights="balanced")
    results = []
    for split in (LABELLED, LABELLED + (UNLABELLED,) * 12):
        dataset = make_dataset(task, split=split)
        data = task_data.load({dataset.store: None}, dataset.images_path, heads, ("train", "val", "test"), "cpu")
        result = protocol.train_and_test(data, HPARAMS, 1, {"dataset": "d", "model": "m", "weights": "random"})
        members, images = task_data.open_aligned({dataset.store: None}, dataset.images_path)
        config = CompositionConfig((), "logistic", 1, False)
        subsets = composition.search({"member": members[0]}, images, heads, config).subsets
        results.append((result.runs, result.predicted, subsets, list(result.group.state_dict().values())))
    for plain, wide in zip(results[0][:3], results[1][:3], strict=True):
        pd.testing.assert_frame_equal(plain, wide, check_exact=True)
    assert all(torch.equal(plain, wide) for plain, wide in zip(results[0][3], results[1][3], strict=True))


@pytest.mark.parametrize("task", ["classification", "multilabel", "segmentation"])
def test_unlabelled_images_teach_distilled_students_only(make_dataset, monkeypatch, task):
    setup = make_dataset(task, split=LABELLED + (UNLABELLED,) * 12).setup(with_steps(3))
    assert set(setup.images.split[setup.training_rows("distilled")]) == {"train", UNLABELLED}
    assert set(setup.images.split[setup.training_rows("supervised")]) == {"train"}

    def train_on(rows):
        student = create_student(setup)
        projectors = train.make_projectors(student, setup, 0)
        monkeypatch.setattr(train.DistillationSetup, "training_rows", lambda *_: rows)
        return train.train(student, projectors, setup, "distilled", HParams(0.01, 0.01, 0)).state_dict()

    with_unlabelled_rows, without, only = (
        train_on(setup.images.rows(*splits)) for splits in (("train", UNLABELLED), ("train",), (UNLABELLED,))
    )
    assert any(not torch.equal(tensor, without[name]) for name, tensor in with_unlabelled_rows.items())
    assert all(torch.isfinite(tensor.float()).all() for tensor in only.values())


def test_no_class_is_refused_by_everything_that_counts_classes():
    """A missing label is an invalid index: a sample without a label cannot count as a class by mistake."""
    label, logits = np.array([0] * 99 + [NO_CLASS]), torch.zeros(1, 100, 3)
    task, label_tensor = Classification(3), torch.from_numpy(label)[None]
    weighted = dataclasses.replace(task, class_weights=(1.0, 1.0, 1.0))
    for use in (
        lambda: task.loss(logits, label_tensor),
        lambda: weighted.loss(logits, label_tensor),
        lambda: task.counts(np.zeros(100, int), label),
        lambda: task_data.balanced_weights(label, task),
        lambda: probes.fit_logistic(task, np.random.default_rng(0).normal(size=(100, 2)), label),
        lambda: ["a", "b", "c"][label[-1]],
    ):
        with pytest.raises((IndexError, ValueError, RuntimeError)):
            use()
