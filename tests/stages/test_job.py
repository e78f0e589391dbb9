"""`dvc repro` on the small grid: results, planned stages, kills and experiments."""

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


def planned_stages(job, *targets: str) -> list[str]:
    """Return the stages that DVC would run now, up to the targets."""
    return re.findall(r"Running stage '([^']+)'", job.run("dvc", "repro", "--dry", *targets))


def test_report_has_the_runs_of_every_dataset_and_model(job):
    runs = pd.read_csv(job.folder / "results/report/runs.csv")
    # Three models on the multispectral dataset, two on RGB, two seeds each; and those of the composition search.
    assert runs.model.isin(SMALL["grid"]["models"]).sum() == (3 + 2) * 2
    frozen = runs[runs.protocol == "frozen"]
    assert set(frozen[~frozen.model.isin(SMALL["grid"]["models"])].dataset) == {"sample-landuse-seg", "sample-trees"}
    students = runs[runs.protocol != "frozen"].groupby("model").protocol.unique().map(list).to_dict()
    assert students == {"small (distilled)": ["distilled"], "small (supervised)": ["supervised"]}
    assert runs.score.between(0, 1).all()
    assert runs.groupby("dataset").n_test.first().to_dict() == {"sample-landuse-seg": 16, "sample-trees": 267}
    scores = json.loads((job.folder / "results/metrics.json").read_text())
    assert scores["sample-trees"].keys() == {"raw", "lite0", "raw+lite0", "small (distilled)", "small (supervised)"}
    page = (job.folder / "results/report/index.html").read_text()
    assert all(name in page for name in ("csmask_b4", "nir", "swir16", "swir22")), "bands that sample-trees lacks"
    assert page.count("data:image/png;base64,") == 5
    assert not re.search(r"(src|href)=\"http", page)


def test_score_equals_the_score_of_the_stored_predictions(job):
    score_functions = {
        "runs/sample-trees/lite0": lambda table: (table.predicted == table.label).mean(),
        "compose/sample-trees/raw+lite0": lambda table: (np.stack(table.probability).argmax(1) == table.label).mean(),
        "runs/sample-landuse-seg/lite0": lambda table: Segmentation(7).score(np.stack(table.counts).sum(0)),
    }
    for folder, score in score_functions.items():
        predictions = pd.read_parquet(job.folder / "results" / folder / "predictions.parquet")
        runs = pd.read_csv(job.folder / "results" / folder / "runs.csv").set_index("seed")
        assert [score(predictions[predictions.seed == seed]) for seed in runs.index] == pytest.approx(
            runs.score.tolist()
        )


def test_composition_search_probes_every_ensemble(job):
    folder = job.folder / "results/compose/sample-landuse-seg"
    subsets = pd.read_csv(folder / "subsets.csv")
    metadata = json.loads((folder / "composition.json").read_text())
    assert len(subsets) == 7
    assert metadata["selected"] == subsets[subsets.members > 1].model.head(2).tolist()
    trained = {path.parent.name for path in folder.glob("*/runs.csv")}
    assert trained == set(metadata["selected"]) - {"csmask_b4+lite0"}, "the grid trains it"
    cka = pd.read_csv(folder / "cka.csv")
    assert set(cka.level) == {"level0", "level1", "level2", "level3", "all"}
    page = (job.folder / "results/report/index.html").read_text()
    assert all(model in page for model in subsets.model)
    trees = json.loads((job.folder / "results/compose/sample-trees/composition.json").read_text())
    assert trees["backbones"] == ["raw", "lite0"]
    assert "csmask_b4" in trees["skipped"][0]


def test_feature_store_opens_as_a_data_tree_with_the_images_samples(job):
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


def test_second_run_does_nothing_within_seconds(job):
    start = time.monotonic()
    assert "Running stage" not in job.run("dvc", "repro")
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"heads": {"linear": {"steps": 21}}}, {"tune", "train", "compose"}),
        ({"train": {"seeds": 3}}, {"train", "compose"}),
        ({"composition": {"probe": "knn"}}, {"compose"}),
    ],
)
def test_edited_head_or_search_extracts_nothing(job, change, stages):
    with job.changed(change):
        assert {name.split("@")[0] for name in planned_stages(job)} == {"validate", *stages}
    assert planned_stages(job) == []


def test_new_ensemble_extracts_nothing(job):
    with job.changed({"grid": {"models": [*SMALL["grid"]["models"], "raw+lite0"]}}):
        assert {name.split("@")[0] for name in planned_stages(job, "resolve")} == {"validate", "resolve"}


def test_edited_backbone_alone_is_extracted_again(job):
    with job.changed({"backbones": {"lite0": {"input_size": 96}}}):
        extracted = {name for name in planned_stages(job, "extract") if name.startswith("extract")}
    assert extracted == {"extract@sample-landuse-seg-lite0", "extract@sample-trees-lite0"}


def stages_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Return the running stages that DVC has started."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "stages." in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.slow
def test_killed_stages_then_repro_gives_the_same_results(job):
    expected = job.results()
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
    assert job.results() == expected
    assert not list((job.folder / "data/scratch").rglob("layout")), "unfinished extraction"


def test_experiment_with_other_seeds_and_models_runs(job):
    params_text = (job.folder / "params.yaml").read_text()
    lock = (job.folder / "dvc.lock").read_text()
    changes = ["train.seeds=3", "grid.datasets=[sample-trees]", "grid.models=[lite0]", "composition.top_k=0"]
    changes += ["grid.students=[]"]
    job.run("dvc", "exp", "run", "-n", "three", *[word for change in changes for word in ("-S", change)])
    runs = pd.read_csv(job.folder / "results/report/runs.csv")
    assert set(runs.model) == {"lite0"}
    assert set(runs.dataset) == {"sample-trees"}
    assert sorted(runs.seed) == [0, 1, 2]
    rows = list(csv.DictReader(job.run("dvc", "exp", "show", "--csv", "--no-pager").splitlines()))
    experiment = next(row for row in rows if row["Experiment"] == "three")
    assert experiment["train.seeds"] == "3"
    assert float(experiment["sample-trees.lite0.mean"]) > 0.4
    job.run("git", "checkout", "-q", ".")
    job.run("dvc", "checkout", "-q")
    assert (job.folder / "params.yaml").read_text() == params_text
    assert (job.folder / "dvc.lock").read_text() == lock


def test_metrics_and_plots_are_shown(job):
    metrics_json = job.run("dvc", "metrics", "show", "--json")
    assert json.loads(metrics_json)[""]["data"]["results/metrics.json"]["data"]["sample-trees"]["lite0"]
    job.run("dvc", "plots", "show", "-o", "plots")
    page = (job.folder / "plots/index.html").read_text()
    assert '"type": "boxplot"' in page
    assert "sample-landuse-seg" in page
