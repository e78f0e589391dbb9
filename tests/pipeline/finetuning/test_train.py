"""Fine-tuning as a whole: learning, selection, reported runs, and resumption after a kill."""

import dataclasses
import multiprocessing
import os
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch

from pipeline.finetuning import train
from pipeline.tasks import counts_from_table
from pipeline.training import protocol as frozen_protocol
from pipeline.training import task_data
from pipeline.training.loop import HParams
from tests.pipeline.finetuning.conftest import CONFIG, HEADS, METADATA

# A checkpoint after every step, so that a kill falls between two checkpoints.
LAST_BLOCK = {"method": "last1", "steps": 4, "val_checks": 4, "seeds": 2, "learning_rates": (1e-5, 1e-4)}


def fine_tune(frozen, folder) -> train.FineTuneResult:
    """Run the whole protocol on the last block of a model."""
    create = partial(frozen.trainable, **LAST_BLOCK)
    return train.run_fine_tuning(create, frozen.job(**LAST_BLOCK), METADATA, folder)


@pytest.fixture(scope="module")
def uninterrupted(frozen_model, tmp_path_factory):
    """Folder and result of a whole protocol."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    torch.set_num_threads(1)
    return folder, fine_tune(frozen_model("classification", "prithvi"), folder)


def test_run_fine_tuning_killed_run_resumes_and_ends_as_an_uninterrupted_one(frozen_model, uninterrupted, tmp_path):
    frozen, (_, expected) = frozen_model("classification", "prithvi"), uninterrupted

    def n_steps() -> int:
        return sum(torch.load(path, weights_only=True)["step"] for path in tmp_path.glob("*.pt"))

    process = multiprocessing.get_context("fork").Process(target=fine_tune, args=(frozen, tmp_path))
    process.start()
    while process.is_alive() and n_steps() < 5:  # in the second of three trainings of four steps
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 5 <= n_steps() < 12
    resumed = fine_tune(frozen, tmp_path)
    assert (expected.runs.best_step > 0).all(), "the frozen weights would be equal in any case"
    assert resumed.runs.equals(expected.runs)
    assert resumed.best_tensors.keys() == expected.best_tensors.keys()
    assert all(torch.equal(tensor, resumed.best_tensors[name]) for name, tensor in expected.best_tensors.items())


def test_run_fine_tuning_runs_have_the_columns_of_the_frozen_protocol_and_more(frozen_model, uninterrupted):
    frozen, (folder, result) = frozen_model("classification", "prithvi"), uninterrupted
    runs, hparams = result.runs, {"learning_rate": 1e-2, "weight_decay": 1e-2}
    frozen_runs = frozen_protocol.train_and_test(frozen.data, hparams, 1, METADATA).runs
    assert set(frozen_runs.columns) <= set(runs.columns)
    assert runs.protocol.tolist() == ["fine-tuned (last 1 blocks)"] * 2
    assert runs.seed.tolist() == [0, 1]
    assert (runs.val_score >= runs.frozen_val_score).all()
    rates = LAST_BLOCK["learning_rates"]
    val_scores = {rate: torch.load(folder / f"{rate:g}-seed0.pt")["best_score"] for rate in rates}
    assert (folder / f"{runs.learning_rate[0]:g}-seed1.pt").exists()
    assert val_scores[runs.learning_rate[0]] == max(val_scores.values()) == runs.val_score[0]
    parameters = frozen.trainable(method="last1").trainable_parameters()
    assert result.best_tensors.keys() == parameters.keys()
    assert runs.trained_parameters.tolist() == [sum(parameter.numel() for parameter in parameters.values())] * 2


@pytest.mark.parametrize(("task", "model_name"), [("segmentation", "prithvi"), ("classification", "raw+lite0")])
def test_run_fine_tuning_scores_can_be_recomputed_from_predictions_and_tensors(
    frozen_model, tmp_path, task, model_name
):
    frozen = frozen_model(task, model_name)
    job = frozen.job(steps=1, val_checks=1, method="lora")
    result = train.run_fine_tuning(lambda seed: frozen.trainable(seed, method="lora"), job, METADATA, tmp_path)
    samples, counts = counts_from_table(result.predicted, job.task)
    assert samples == sorted(frozen.data.splits["test"].sample)
    assert result.runs.score[0] == job.task.score(counts[0].sum(axis=0))
    assert result.runs.protocol[0] == "fine-tuned (lora)"
    model = frozen.trainable(7, method="lora")
    model.load_trainable(result.best_tensors)
    assert np.array_equal(train.count_predictions(model, job, "test").sum(axis=0), counts[0].sum(axis=0))


def test_train_backbone_learns_with_a_frozen_head(frozen_model):
    """The labels are shifted, so that only a change of the features can reduce the loss."""
    frozen = frozen_model("classification", "prithvi")
    job, model = frozen.job(), frozen.trainable(layer_decay=1.0)
    model.head.requires_grad_(False)
    rows = job.images.rows("train")[:4]
    job.images._label[rows] = (job.images._label[rows] + 1) % job.task.n_classes
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-3, 0.0))
    losses = [train.train_step(model, optimizer, job, rows, None).item() for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0], losses


def test_train_diverged_run_ends_as_the_frozen_model(frozen_model, tmp_path):
    frozen = frozen_model("classification", "prithvi")
    model, job = frozen.trainable(), frozen.job(steps=4, val_checks=4)
    state = train.train(model, job, HParams(1e30, 0.0, 0), tmp_path / "checkpoint.pt")
    assert state.finished
    assert state.step < 4
    assert all(torch.isfinite(parameter).all() for parameter in model.trainable_parameters().values())


def test_make_task_class_weights_equal_those_of_frozen_heads(frozen_model):
    frozen = frozen_model("segmentation", "prithvi")
    images = frozen.job().images
    heads = dataclasses.replace(HEADS, class_weights="balanced")
    expected = task_data.load(frozen.stores, frozen.images_path, heads, ("train",), "cpu").task
    task = train.make_task(images, "balanced")
    assert task.class_weights == pytest.approx(expected.class_weights)
    assert dataclasses.replace(task, class_weights=None) == train.make_task(images, "none")


def test_checkpoint_folder_depends_on_the_settings(tmp_path):
    folder = train.checkpoint_folder(tmp_path, [dataclasses.asdict(CONFIG)])
    (folder / "x.pt").touch()
    assert train.checkpoint_folder(tmp_path, [dataclasses.asdict(CONFIG)]) == folder
    assert (folder / "x.pt").exists()
    changed = dataclasses.replace(CONFIG, rank=4)
    assert train.checkpoint_folder(tmp_path, [dataclasses.asdict(changed)]) != folder
    assert not folder.exists()
