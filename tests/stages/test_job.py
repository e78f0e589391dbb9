"""The small grid: its results, what DVC plans after a change, kills and experiments."""

import contextlib
import csv
import json
import re
import shutil
import subprocess
import time

import numpy as np
import pandas as pd
import psutil
import pytest
from filelock import FileLock

from pipeline.tasks import Segmentation
from tests.stages.conftest import SMALL

DATASETS = SMALL["grid"]["datasets"]
SEGMENTATION, TREES = DATASETS


def test_report_has_the_runs_of_every_dataset_and_model(job):
    runs = pd.read_csv(job.folder / "results/report/runs.csv")
    # Three models on the multispectral dataset, two on RGB, two seeds each; and those of the composition search.
    assert runs.model.isin(SMALL["grid"]["models"]).sum() == (3 + 2) * 2
    frozen = runs[runs.protocol == "frozen"]
    assert set(frozen[~frozen.model.isin(SMALL["grid"]["models"])].dataset) == set(DATASETS)
    students = runs[runs.protocol != "frozen"].groupby("model").protocol.unique().map(list).to_dict()
    assert students == {"small (distilled)": ["distilled"], "small (supervised)": ["supervised"]}
    assert runs.score.between(0, 1).all()
    assert runs.groupby("dataset").n_test.first().to_dict() == {SEGMENTATION: 16, TREES: 57}
    scores = json.loads((job.folder / "results/metrics.json").read_text())
    models = {"raw", "lite0", "raw+lite0", "raw+lite0, averaged", "small (distilled)", "small (supervised)"}
    assert scores[TREES].keys() == models
    page = (job.folder / "results/report/index.html").read_text()
    assert all(name in page for name in ("csmask_b4", "nir", "swir16", "swir22")), "bands that sample-trees lacks"
    assert page.count("data:image/png;base64,") == 6


def test_score_equals_the_score_of_the_stored_predictions(job):
    score_functions = {
        f"runs/{TREES}/lite0": lambda rows: (rows.predicted == rows.label).mean(),
        f"train_selected/{TREES}/raw+lite0": lambda rows: (np.stack(rows.probability).argmax(1) == rows.label).mean(),
        f"runs/{SEGMENTATION}/lite0": lambda rows: Segmentation(7).score(np.stack(rows.counts).sum(0)),
    }
    for folder, score in score_functions.items():
        predictions = pd.read_parquet(job.folder / "results" / folder / "predictions.parquet")
        runs = pd.read_csv(job.folder / "results" / folder / "runs.csv").set_index("seed")
        scores = [score(predictions[predictions.seed == seed]) for seed in runs.index]
        assert scores == pytest.approx(runs.score.tolist())


def test_composition_search_probes_every_ensemble_and_trains_the_selected(job):
    folder = job.folder / "results/compose" / SEGMENTATION
    subsets = pd.read_csv(folder / "subsets.csv")
    selected = json.loads((folder / "composition.json").read_text())["selected"]
    assert len(subsets) == 7
    assert selected == subsets[subsets.members > 1].model.head(2).tolist()
    trained = json.loads((job.folder / "results/train_selected" / SEGMENTATION / "models.json").read_text())
    assert set(trained) == set(selected) - {"csmask_b4+lite0"}, "the grid trains it"
    assert set(pd.read_csv(folder / "cka.csv").level) == {"level0", "level1", "level2", "level3", "all"}
    page = (job.folder / "results/report/index.html").read_text()
    assert all(model in page for model in subsets.model)
    trees = json.loads((job.folder / "results/compose" / TREES / "composition.json").read_text())
    assert trees["backbones"] == ["raw", "lite0"]
    assert "csmask_b4" in trees["skipped"][0]


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"train": {"seeds": 3}}, {"train", "train_selected"}),
        ({"search": {"trials": 3}}, {"tune", "tune_selected"}),
        ({"composition": {"probe": "knn"}}, {"compose"}),
        ({"students": {"small": {"chip_size": 64}}}, {"distill"}),
        ({"distill": {"temperature": 3.0}}, {"distill"}),
        ({"heads": {"linear": {"steps": 21}}}, {"resolve"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_plan_after_a_change_has_only_its_stages(job, change, stages):
    with job.changed(change):
        assert {name.split("@")[0] for name in job.planned()} - {"validate", "report"} == stages


def test_plan_after_a_head_parameter_or_a_new_model_has_only_what_they_change(job):
    """A dry run does not foresee the outputs of `resolve`, so it runs here."""
    models = SMALL["grid"]["models"]
    for change, expected in (
        ({"heads": {"linear": {"steps": 3}}}, {f"tune@{TREES}-{model}" for model in models}),
        ({"grid": {"models": [*models, "raw+lite0"]}}, {f"tune@{dataset}-raw+lite0" for dataset in DATASETS}),
    ):
        with job.changed(change):
            for name in DATASETS:
                job.stage("resolve", "--dataset", name)
            planned = {name for name in job.planned("tune") if not name.startswith(("validate", "resolve"))}
        assert planned == expected
    for name in DATASETS:
        job.stage("resolve", "--dataset", name)
    assert job.planned() == []


def test_plan_after_new_features_of_a_backbone_in_no_model_reads_its_weights_again(job):
    """A student may start from the weights of such a backbone."""
    manifest = job.folder / f"data/manifests/{TREES}/csmask_b4.json"
    text = manifest.read_text()
    manifest.unlink()  # DVC links it to its cache
    manifest.write_text(text + " ")
    planned = job.planned("teacher")
    manifest.write_text(text)
    assert f"teacher@{TREES}" in planned
    assert f"teacher@{SEGMENTATION}" not in planned


def test_plan_after_a_backbones_change_extracts_it_alone(job):
    with job.changed({"backbones": {"lite0": {"input_size": 96}}}):
        extracted = {name for name in job.planned("extract") if name.startswith("extract")}
    assert extracted == {f"extract@{dataset}-lite0" for dataset in DATASETS}


def contents(*folders) -> dict[str, bytes]:
    """Read every file of some folders, by its path."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name != ".gitignore"]
    return {str(path): path.read_bytes() for path in files}


def test_plan_after_training_other_seeds_has_only_the_report(job):
    """A third seed changes no head of the first two, and so no teacher, unless it is the best."""
    outputs = ("results/runs", "results/heads", "results/train_selected", "results/distill")
    before = {name: contents(job.folder / name) for name in outputs}
    for name in outputs[:3]:
        shutil.copytree(job.folder / name, job.folder.parent / name)
    with job.changed({"train": {"seeds": 3}}):
        for dataset in DATASETS:
            for model in SMALL["grid"]["models"]:
                job.stage("train", "--dataset", dataset, "--model", model)
            job.stage("train", "--dataset", dataset, "--selected")
        assert pd.read_csv(job.folder / "results/runs/sample-trees/lite0/runs.csv").seed.tolist() == [0, 1, 2]
        job.commit("train", "train_selected")
        after = contents(job.folder / "results/heads")
        heads = [path.split("/heads/")[1] for path in after if after[path] != before["results/heads"][path]]
        changed = {head.split("/")[0] for head in heads}
        assert {*job.planned()} == {"validate", "report", *(f"teacher@{dataset}" for dataset in changed)}
    for name in outputs[:3]:
        shutil.rmtree(job.folder / name)
        shutil.move(job.folder.parent / name, job.folder / name)
    job.commit("train", "train_selected")
    assert job.planned() == []


@pytest.mark.slow
def test_experiment_runs_its_stages_and_is_listed(job):
    params_text, lock = ((job.folder / name).read_text() for name in ("params.yaml", "dvc.lock"))
    teachers = contents(*(job.folder / "results/distill").glob("*/teacher"))
    output = job.run("dvc", "exp", "run", "-n", "three", "-S", "train.seeds=3")
    executed = {name.split("@")[0] for name in re.findall(r"Running stage '([^']+)'", output)}
    same_teachers = contents(*(job.folder / "results/distill").glob("*/teacher")) == teachers
    students = set() if same_teachers else {"distill", "export", "map", "cost"}
    assert executed - students - {"teacher"} == {"validate", "train", "train_selected", "report"}
    rows = list(csv.DictReader(job.run("dvc", "exp", "show", "--csv", "--no-pager").splitlines()))
    experiment = next(row for row in rows if row["Experiment"] == "three")
    assert experiment["train.seeds"] == "3"
    assert float(experiment["sample-trees.lite0.mean"]) > 0.4
    job.run("git", "checkout", "-q", ".")
    job.run("dvc", "checkout", "-q")
    assert ((job.folder / "params.yaml").read_text(), (job.folder / "dvc.lock").read_text()) == (params_text, lock)


def stages_of(process) -> list[psutil.Process]:
    """Return the running stages that DVC has started."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "stages." in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.slow
def test_killed_stages_then_repro_gives_the_same_results(job):
    expected = contents(job.folder / "results", job.folder / "data/manifests")
    generator = np.random.default_rng(0)
    stages = {
        "prepare@sample-landuse-seg": 1.5, "extract@sample-trees-lite0": 6, "tune@sample-landuse-seg-lite0": 4,
        "train@sample-landuse-seg-lite0": 4, "distill@sample-trees-small": 6, "report": 2,
    }  # fmt: skip
    killed = 0
    for number, (stage, seconds) in enumerate(stages.items()):
        process = job.start("dvc", "repro", "--single-item", "--force", stage)
        while process.poll() is None and not stages_of(process):
            time.sleep(0.01)
        time.sleep(generator.uniform(0, seconds))
        # DVC itself does not survive a kill while it writes dvc.lock, so only kill it while the stage runs.
        running = stages_of(process)
        if running:
            process.kill()
            killed += 1
            # Every other time only DVC is killed and the stage continues, as when a user kills DVC.
            for orphan in running if number % 2 == 0 else []:
                with contextlib.suppress(psutil.NoSuchProcess):
                    orphan.kill()
        process.wait()
    assert killed >= 3
    job.run("dvc", "repro")
    assert contents(job.folder / "results", job.folder / "data/manifests") == expected
    assert not list((job.folder / "data/scratch").rglob("layout")), "unfinished extraction"


def test_stage_waits_for_another_process_with_its_arguments(job):
    lock = FileLock(job.folder / "data/scratch/resolve-sample-trees.lock")
    with lock:
        process = job.start("python", "-m", "stages.resolve", "--dataset", TREES, stderr=subprocess.PIPE)
        assert b"waiting" in process.stderr.readline()
        assert process.poll() is None
    assert process.wait() == 0


def test_metrics_and_plots_are_shown(job):
    with job.repository() as repo:
        metrics, plots = repo.metrics.show(), repo.plots.show()
    assert metrics[""]["data"]["results/metrics.json"]["data"][TREES]["lite0"]
    assert plots
