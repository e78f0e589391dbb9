"""`dvc repro` end to end on the small grid: results, plans, kills and experiments."""

import csv
import json
import os
import re
import signal
import time

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from tests.stages.conftest import SMALL


def planned(job) -> list[str]:
    """Stages that DVC itself would run now."""
    return re.findall(r"Running stage '([^']+)'", job.run("dvc", "repro", "--dry"))


def test_every_cell_has_its_runs_and_the_report_stands(job):
    runs = pd.read_csv(job.folder / "results/report/runs.csv")
    # Three models on the multispectral set, two on RGB, two seeds each.
    assert len(runs) == (3 + 2) * 2
    assert set(runs.protocol) == {"frozen"}
    assert runs.score.between(0, 1).all()
    assert runs.groupby("dataset").n_test.first().to_dict() == {"sample-landuse-seg": 16, "sample-trees": 267}
    scores = json.loads((job.folder / "results/metrics.json").read_text())
    assert scores["sample-trees"].keys() == {"raw", "lite0"}
    page = (job.folder / "results/report/index.html").read_text()
    assert "csmask_b4 needs the bands nir, swir16, swir22" in page
    assert "data:image/png;base64," in page
    assert not re.search(r"(src|href)=\"http", page)


def test_the_report_recomputes_from_the_stored_counts(job):
    from pipeline import metrics

    folder = job.folder / "results/runs/sample-trees/lite0"
    tested = pd.read_parquet(folder / "test_counts.parquet")
    for seed, row in pd.read_csv(folder / "runs.csv").set_index("seed").iterrows():
        counts = np.stack(tested[tested.seed == seed].counts)
        assert metrics.score("classification", counts.sum(0), 2) == row.score


def test_feature_stores_open_as_trees_with_their_images_samples(job):
    for dataset, levels in (("sample-landuse-seg", 4), ("sample-trees", 0)):
        images = xr.open_zarr(job.folder / f"data/images/{dataset}.zarr")
        tree = xr.open_datatree(job.folder / f"data/features/{dataset}/lite0.zarr", engine="zarr")
        assert sum(name.startswith("level") for name in tree.children) == levels
        assert tree.sample.values.tolist() == images.sample.values.tolist()
        assert tree.attrs["images_sha256"] == images.attrs["content_sha256"]
        assert tree.attrs["weights"]["weights"] == "pretrained"
        assert len(tree.attrs["weights"]["file_sha256"]) == 64
        assert tree["pooled"].mean_level3.shape == (images.sizes["sample"], 320)
        assert np.isfinite(tree["pooled"].mean_level3).all()


def test_a_second_run_does_nothing_within_seconds(job):
    begun = time.monotonic()
    assert "Data and pipelines are up to date" in job.run("dvc", "repro")
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize(
    ("change", "runs", "rests"),
    [
        (
            {"heads": {"linear": {"steps": 21}}},
            {"tune", "train", "report"},
            {"extract", "prepare", "fetch", "resolve"},
        ),
        ({"train": {"seeds": 3}}, {"train"}, {"tune", "extract", "resolve"}),
        (
            {"grid": {"models": [*SMALL["grid"]["models"], "raw+lite0"]}},
            {"resolve"},
            {"extract", "prepare", "fetch"},
        ),
    ],
)
def test_what_an_edit_runs_again(job, change, runs, rests):
    before = (job.folder / "params.yaml").read_text()
    job.change(change)
    verbs = {name.split("@")[0] for name in planned(job)}
    (job.folder / "params.yaml").write_text(before)
    assert runs <= verbs
    assert not rests & verbs
    assert planned(job) == []


def test_an_edited_backbone_is_extracted_again_and_no_other(job):
    before = (job.folder / "params.yaml").read_text()
    job.change({"backbones": {"lite0": {"input_size": 96}}})
    extracted = {name for name in planned(job) if name.startswith("extract")}
    (job.folder / "params.yaml").write_text(before)
    assert extracted == {"extract@sample-landuse-seg-lite0", "extract@sample-trees-lite0"}


def test_kill_9_in_every_stage_then_repro_ends_with_the_same_results(job):
    before = job.results()
    generator = np.random.default_rng(0)
    stages = [
        "fetch@sample-trees", "prepare@sample-landuse-seg", "extract@sample-trees-lite0",
        "resolve@sample-trees", "tune@sample-landuse-seg-lite0", "train@sample-landuse-seg-lite0", "report",
    ]  # fmt: skip
    for stage in stages:
        process = job.start("dvc", "repro", "--single-item", "--force", stage)
        time.sleep(generator.uniform(2.5, 5))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    job.run("dvc", "repro")
    assert job.results() == before
    left = [path.name for path in (job.folder / "data/scratch").iterdir()]
    assert not [name for name in left if (job.folder / "data/scratch" / name / "store.zarr").exists()], left


def test_an_experiment_with_other_seeds_and_models(job):
    before = (job.folder / "params.yaml").read_text()
    lock = (job.folder / "dvc.lock").read_text()
    job.run("dvc", "exp", "run", "-n", "three", "-S", "train.seeds=3", "-S", "grid.models=[lite0]")
    runs = pd.read_csv(job.folder / "results/report/runs.csv")
    assert set(runs.model) == {"lite0"}
    assert sorted(runs[runs.dataset == "sample-trees"].seed) == [0, 1, 2]
    shown = list(csv.DictReader(job.run("dvc", "exp", "show", "--csv", "--no-pager").splitlines()))
    experiment = next(row for row in shown if row["Experiment"] == "three")
    assert experiment["train.seeds"] == "3"
    assert float(experiment["sample-trees.lite0.mean"]) > 0.4
    job.run("git", "checkout", "-q", ".")
    job.run("dvc", "checkout", "-q")
    assert (job.folder / "params.yaml").read_text() == before
    assert (job.folder / "dvc.lock").read_text() == lock


def test_metrics_and_plots_show(job):
    shown = job.run("dvc", "metrics", "show", "--json")
    assert json.loads(shown)[""]["data"]["results/metrics.json"]["data"]["sample-trees"]["lite0"]
    job.run("dvc", "plots", "show", "-o", "plots")
    page = (job.folder / "plots/index.html").read_text()
    assert '"type": "boxplot"' in page
    assert "sample-landuse-seg" in page
