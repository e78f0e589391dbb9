"""`dvc repro` end to end on the small grid: results, plans, kills and experiments."""

import contextlib
import csv
import json
import re
import subprocess
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import xarray as xr

from pipeline.tasks import Segmentation
from tests.stages.conftest import SMALL


def planned(job, *targets: str) -> list[str]:
    """Stages that DVC itself would run now, up to the targets."""
    return re.findall(r"Running stage '([^']+)'", job.run("dvc", "repro", "--dry", *targets))


def test_every_cell_has_its_runs_and_the_report_stands(job):
    runs = pd.read_csv(job.folder / "results/report/runs.csv")
    # Three models on the multispectral set, two on RGB, two seeds each; and what the composition search chose.
    assert runs.model.isin(SMALL["grid"]["models"]).sum() == (3 + 2) * 2
    frozen = runs[runs.protocol == "frozen"]
    assert set(frozen[~frozen.model.isin(SMALL["grid"]["models"])].dataset) == {"sample-landuse-seg", "sample-trees"}
    others = runs[runs.protocol != "frozen"].groupby("model").protocol.unique().map(list).to_dict()
    assert others == {"small (distilled)": ["distilled"], "small (supervised)": ["supervised"]}
    assert runs.score.between(0, 1).all()
    assert runs.groupby("dataset").n_test.first().to_dict() == {"sample-landuse-seg": 16, "sample-trees": 267}
    scores = json.loads((job.folder / "results/metrics.json").read_text())
    assert scores["sample-trees"].keys() == {"raw", "lite0", "raw+lite0", "small (distilled)", "small (supervised)"}
    page = (job.folder / "results/report/index.html").read_text()
    assert "csmask_b4 needs the bands nir, swir16, swir22" in page
    assert page.count("data:image/png;base64,") == 5
    assert not re.search(r"(src|href)=\"http", page)


def test_every_score_recomputes_from_the_predictions_kept(job):
    tested = {
        "runs/sample-trees/lite0": lambda one: (one.predicted == one.label).mean(),
        "compose/sample-trees/raw+lite0": lambda one: (np.stack(one.probability).argmax(1) == one.label).mean(),
        "runs/sample-landuse-seg/lite0": lambda one: Segmentation(7).score(np.stack(one.counts).sum(0)),
    }
    for folder, score in tested.items():
        kept = pd.read_parquet(job.folder / "results" / folder / "predictions.parquet")
        runs = pd.read_csv(job.folder / "results" / folder / "runs.csv").set_index("seed")
        assert [score(kept[kept.seed == seed]) for seed in runs.index] == pytest.approx(runs.score.tolist())


def test_the_composition_search_probed_every_ensemble(job):
    folder = job.folder / "results/compose/sample-landuse-seg"
    subsets = pd.read_csv(folder / "subsets.csv")
    metadata = json.loads((folder / "composition.json").read_text())
    assert len(subsets) == 7
    assert metadata["selected"] == subsets[subsets.members > 1].model.head(2).tolist()
    assert set(metadata["trained"]) == set(metadata["selected"]) - {"csmask_b4+lite0"}, "the grid's own is not run again"
    cka = pd.read_csv(folder / "cka.csv")
    assert set(cka.level) == {"level0", "level1", "level2", "level3", "all"}
    page = (job.folder / "results/report/index.html").read_text()
    assert all(model in page for model in subsets.model)
    trees = json.loads((job.folder / "results/compose/sample-trees/composition.json").read_text())
    assert trees["backbones"] == ["raw", "lite0"]
    assert "csmask_b4 needs the bands" in trees["skipped"][0]


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
    ("change", "runs"),
    [
        ({"heads": {"linear": {"steps": 21}}}, {"tune", "train", "compose"}),
        ({"train": {"seeds": 3}}, {"train", "compose"}),
        ({"compose": {"probe": "knn"}}, {"compose"}),
    ],
)
def test_an_edited_head_extracts_nothing(job, change, runs):
    with job.changed(change):
        assert {name.split("@")[0] for name in planned(job)} == {"check", *runs}
    assert planned(job) == []


def test_a_new_ensemble_extracts_nothing(job):
    with job.changed({"grid": {"models": [*SMALL["grid"]["models"], "raw+lite0"]}}):
        assert {name.split("@")[0] for name in planned(job, "resolve")} == {"check", "resolve"}


def test_an_edited_backbone_is_extracted_again_and_no_other(job):
    with job.changed({"backbones": {"lite0": {"input_size": 96}}}):
        extracted = {name for name in planned(job, "extract") if name.startswith("extract")}
    assert extracted == {"extract@sample-landuse-seg-lite0", "extract@sample-trees-lite0"}


def stages_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The running stages that DVC has started."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "stages." in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.slow
def test_kill_9_in_stages_then_repro_ends_with_the_same_results(job):
    before = job.results()
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
        # Only while the stage runs: DVC itself is not proof against a kill while it writes dvc.lock.
        running = stages_of(process)
        if running:
            process.kill()
            killed += 1
            # Every other time the stage outlives DVC, as it does when a user kills DVC alone.
            for orphan in running if number % 2 == 0 else []:
                with contextlib.suppress(psutil.NoSuchProcess):
                    orphan.kill()
        process.wait()
    assert killed >= 3
    job.run("dvc", "repro")
    assert job.results() == before
    assert not list((job.folder / "data/scratch").rglob("layout")), "an extraction was left unfinished"


def test_an_experiment_with_other_seeds_and_models(job):
    before = (job.folder / "params.yaml").read_text()
    lock = (job.folder / "dvc.lock").read_text()
    changes = ["train.seeds=3", "grid.datasets=[sample-trees]", "grid.models=[lite0]", "composition.top_k=0"]
    changes += ["grid.students=[]"]
    job.run("dvc", "exp", "run", "-n", "three", *[word for change in changes for word in ("-S", change)])
    runs = pd.read_csv(job.folder / "results/report/runs.csv")
    assert set(runs.model) == {"lite0"}
    assert set(runs.dataset) == {"sample-trees"}
    assert sorted(runs.seed) == [0, 1, 2]
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
