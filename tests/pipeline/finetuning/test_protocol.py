"""Fine-tuning as a whole: what it learns, what it chooses and says, and that a kill changes nothing."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from pipeline.config import HeadsConfig
from pipeline.data.augmentation import AugmentedImages
from pipeline.finetuning import protocol as finetuning
from pipeline.finetuning import train
from pipeline.training import predictions, protocol
from pipeline.training.loop import HParams
from tests.conftest import ROOT
from tests.pipeline.finetuning.conftest import FEW, HEADS
from tests.pipeline.finetuning.killed import MANY, TOLD, fine_tune

# As the tests' own process computes: sums of floats depend on the number of threads.
ALONE = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(frozen, tmp_path):
    one = frozen("sample-landuse", "lite0")
    pictures, broken = one.opened.encoding["source"], tmp_path / "broken"
    runs, best = fine_tune(pictures, one.head, tmp_path / "unbroken")
    command = [sys.executable, "-m", "tests.pipeline.finetuning.killed", pictures, str(one.head), str(broken)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ALONE})
    while process.poll() is None and steps(broken) < 8:  # in the second of three trainings
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 8 <= steps(broken) < 18
    again, found = fine_tune(pictures, one.head, broken)
    assert again.equals(runs)
    assert found.keys() == best.keys()
    assert all(torch.equal(values, found[name]) for name, values in best.items())


def steps(folder) -> int:
    """Steps of all the checkpoints in a folder."""
    return sum(torch.load(path, weights_only=True)["step"] for path in folder.glob("*.pt"))


def test_what_is_said_is_what_the_frozen_protocol_says_and_more(frozen, tmp_path):
    one = frozen("sample-landuse", "lite0")
    runs, best = fine_tune(one.opened.encoding["source"], one.head, tmp_path / "runs")
    theirs = protocol.train_and_test(one.cell, {"learning_rate": 1e-2, "weight_decay": 1e-2}, 1, TOLD).runs
    assert set(theirs.columns) <= set(runs.columns)
    assert runs.protocol.tolist() == ["fine-tuned (lora)"] * 2
    assert runs.seed.tolist() == [0, 1]
    assert (runs.val_score >= runs.frozen_val_score).all()
    tried = {rate: torch.load(tmp_path / f"runs/{rate:g}-seed0.pt")["best"] for rate in MANY.learning_rates}
    assert (tmp_path / f"runs/{runs.learning_rate[0]:g}-seed1.pt").exists()
    assert tried[runs.learning_rate[0]] == max(tried.values()) == runs.val_score[0]
    trained = one.tuned(method="lora").trained()
    assert best.keys() == trained.keys()
    assert runs.trained_parameters.tolist() == [sum(values.numel() for values in trained.values())] * 2


@pytest.mark.parametrize(("dataset", "model"), [("sample-landuse-seg", "prithvi"), ("sample-landuse", "raw+lite0")])
def test_scores_recompute_from_predictions_and_the_kept_tensors(frozen, job, tmp_path, dataset, model):
    one, asked = frozen(dataset, model), job(frozen(dataset, model), steps=2, val_checks=1, method="lora")
    tested = finetuning.run_fine_tuning(lambda seed: one.tuned(seed, method="lora"), asked, TOLD, tmp_path)
    task = asked.task
    samples, counts = predictions.counts_from_table(tested.predicted, task.kind, task.classes)
    assert samples == sorted(one.cell.parts["test"].sample)
    assert tested.runs.score[0] == task.score(counts[0].sum(axis=0))
    assert tested.runs.protocol[0] == "fine-tuned (lora)"
    again = one.tuned(7, method="lora")
    again.load(tested.best)
    assert np.array_equal(train.counts(again, asked, "test").sum(axis=0), counts[0].sum(axis=0))


def test_a_backbone_learns_for_a_head_that_is_held_still(frozen, job):
    """Other labels than the head was trained on, so that only a change of the features can tell them."""
    one = frozen("sample-landuse", "prithvi")
    asked, tuned = job(one), one.tuned(layer_decay=1.0)
    tuned.head.requires_grad_(False)
    rows = asked.images.rows("train")
    asked.images._label[rows] = (asked.images._label[rows] + 1) % asked.task.classes
    optimiser = torch.optim.AdamW(tuned.groups(1e-3, 0.0))
    lost = [train.update(tuned, optimiser, asked, rows, None).item() for _ in range(25)]
    assert lost[-1] < 0.2 * lost[0]


def test_a_run_that_diverges_ends_as_the_frozen_model(frozen, job, tmp_path):
    one = frozen("sample-landuse", "lite0")
    tuned, asked = one.tuned(), job(one, steps=8, val_checks=8)
    done = train.train(tuned, asked, HParams(1e30, 0.0, 0), tmp_path / "checkpoint.pt")
    assert done.finished
    assert done.step < 8
    assert all(torch.isfinite(values).all() for values in tuned.trained().values())


def test_images_and_masks_turn_together_and_the_store_stays_as_it_is(images_path, tmp_path):
    from pipeline.data import image_store

    opened = image_store.open_images(images_path("sample-landuse-seg")).isel(sample=slice(0, 8)).load()
    opened["image"] = opened.image.copy(data=np.stack([opened.label.values] * opened.sizes["band"], axis=1))
    pictures = AugmentedImages.copy_to_file(opened, tmp_path / "images.npy")
    rows, generator, turned = np.arange(8), np.random.default_rng(0), set()
    for _ in range(20):
        image, label = pictures.batch(rows, generator)
        assert np.array_equal(image[:, 0], label)
        turned.add(image[0].tobytes())
    assert len(turned) == 8
    plain, label = pictures.batch(rows)
    assert np.array_equal(plain[:, 0], opened.label.values)
    assert np.array_equal(label, opened.label.values)


def test_classes_are_weighted_as_for_frozen_heads(frozen, job):
    from pipeline.training import task_data

    one = frozen("sample-landuse-seg", "prithvi")
    pictures = job(one).pictures
    heads = HeadsConfig(**{**vars(HEADS), "class_weights": "balanced"})
    wanted = task_data.load(one.stores, one.path, heads, ("train",), "cpu").task
    found = finetuning.make_task(one.opened, pictures, "balanced")
    assert found.class_weights == pytest.approx(wanted.class_weights)
    assert dataclasses.replace(found, weights=None) == finetuning.make_task(one.opened, pictures, "none")


def test_other_settings_have_other_checkpoints(tmp_path):
    first = finetuning.checkpoint_folder(tmp_path, [dataclasses.asdict(FEW)])
    (first / "x.pt").touch()
    assert finetuning.checkpoint_folder(tmp_path, [dataclasses.asdict(FEW)]) == first
    assert (first / "x.pt").exists()
    assert finetuning.checkpoint_folder(tmp_path, [dataclasses.asdict(dataclasses.replace(FEW, rank=4))]) != first
    assert not first.exists()
