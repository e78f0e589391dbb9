"""GEO-Bench and the paper's profile through the stages: all twelve sets, and plans of the grid."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import xarray as xr
import yaml

from pipeline import config
from pipeline.backbones import get_spec
from pipeline.backbones.base import match_bands
from pipeline.data.sources import geobench
from stages import cost, distill, export, teacher
from stages.plan import plan
from tests.conftest import ROOT
from tests.stages import smoke_paper
from tests.stages.conftest import Job, merge

SETS = list(geobench.SETS)
DISTILLED_SETS = ["m-bigearthnet", "m-so2sat", "m-nz-cattle"]  # one per task
SMALL = {
    "grid": {"datasets": SETS, "backbones": ["raw"], "models": ["raw"]},
    "backbones": {"raw": {"input_size": 64}},
    "heads": {
        "segmentation": "upernet", "linear": {"steps": 5, "batch": 4},
        "upernet": {"steps": 2, "channels": 4, "batch": 2},
    },
    "search": {"trials": 1, "trials_per_round": 1},
    "train": {"seeds": 1},
    "students": {"small": {"network": "test_resnet", "chip_size": 32, "mask_size": 32}},
    "distill": {
        "datasets": DISTILLED_SETS, "teacher": "raw", "classification": {"steps": 1, "batch": 4},
        "segmentation": {"steps": 1, "batch": 2},
        "seeds": 1, "search": {"trials": 1},
    },
}  # fmt: skip
PAPER = yaml.safe_load((ROOT / "profiles/paper.yaml").read_text())


@pytest.fixture
def geobench_job(tmp_path, monkeypatch, geobench_root):
    """A folder with only a params.yaml, with the paper's bands, small heads and small sets."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content = merge(merge(content, {"datasets": PAPER["datasets"]}), SMALL | {"geobench_dir": str(geobench_root)})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    return Job(tmp_path)


def test_stages_all_twelve_sets_reach_the_report(geobench_job):
    with geobench_job.changed({"grid": {"students": []}}):
        for _, step in smoke_paper.steps(SMALL["grid"]):
            step()
    for name in DISTILLED_SETS:
        teacher.teacher(name)
        distill.distill(name, "small")
        students = pd.read_csv(f"results/distill/{name}/small/runs.csv")
        assert students.model.tolist() == ["small (distilled)", "small (supervised)"]
        assert students.score.between(0, 1).all()
    # The small grid exports and maps students of other tasks (test_map.py).
    with geobench_job.changed({"distill": {"datasets": DISTILLED_SETS[:1]}}):
        export.export("small", DISTILLED_SETS[0], False)
        cost.cost(DISTILLED_SETS[0])
    assert set(pd.read_csv(f"results/cost/{DISTILLED_SETS[0]}.csv").model) == {"small", "raw"}
    runs = pd.read_csv("results/report/runs.csv")
    assert len(runs) == len(SETS)
    assert runs.score.between(0, 1).all()
    metric = runs.groupby("dataset").metric.first().to_dict()
    assert metric["m-bigearthnet"] == "micro F1"
    assert metric["m-so2sat"] == "accuracy"
    assert metric["m-SA-crop-type"] == "mean IoU"
    for name in SETS:
        store = xr.open_zarr(f"data/images/{name}.zarr")
        assert store.band.values.tolist() == PAPER["datasets"][name]["options"]["bands"]
        assert store.wavelength.notnull().all(), "optical bands only"
        assert not list(Path("data/raw", name).glob("*.hdf5")), "files are read in place"


def test_prepare_damaged_file_is_refused_or_skipped(job, geobench_root, tmp_path):
    shutil.copytree(geobench_root / "classification_v1.0/m-so2sat", tmp_path / "m-so2sat")
    (tmp_path / "m-so2sat/id_0003.hdf5").write_bytes(b"nothing")
    with job.changed({"geobench_dir": str(tmp_path)}):
        job.stage("fetch", "--dataset", "m-so2sat")
        assert str(tmp_path / "m-so2sat/id_0003.hdf5") in str(job.stage_error("prepare", "--dataset", "m-so2sat"))
        output = job.stage("prepare", "--dataset", "m-so2sat", "--skip-bad")
        assert "id_0003" in output
        assert "{'train': 5, 'val': 4, 'test': 4}" in output
    shutil.rmtree(job.folder / "data/raw/m-so2sat")  # the report depends on data/raw


def test_profile_paper_plans_every_stage_and_an_unknown_profile_is_refused(fresh_clone):
    error = fresh_clone.stage_error("profile", "--name", "papre")
    assert (error.value, error.allowed) == ("papre", ("paper", "samples"))
    shutil.copy(ROOT / "params.yaml", fresh_clone.folder)
    fresh_clone.stage("profile", "--name", "paper")
    # Without force_downstream DVC looks in its run cache for files that do not exist yet.
    stages = [name.split("@")[0] for name in fresh_clone.planned(force_downstream=True)]
    counts = {"fetch": 12, "fetch_weights": 4, "prepare": 12, "extract": 48, "tune": 96, "train": 96, "compose": 12}
    assert {stage: stages.count(stage) for stage in counts} == counts
    params = config.load(fresh_clone.folder / "params.yaml")
    assert (params.search.trials, params.train.seeds) == (16, 10)
    assert {params.backbone(name).input_size for name in params.grid.backbones} == {224}
    assert set(params.grid.datasets) == set(SETS)
    text = (fresh_clone.folder / "params.yaml").read_text()
    assert "# family: a file in pipeline/backbones" in text, "comments stay"


def test_profile_paper_has_the_bands_of_table_2(params):
    """Hiera uses RGB of every set; Prithvi and DOFA use all selected bands of the set."""
    six, four, rgb = ["blue", "green", "red", "nir08", "swir16", "swir22"], ["blue", "green", "red", "nir"], 3
    multispectral = ("m-bigearthnet", "m-so2sat", "m-brick-kiln", "m-forestnet", "m-eurosat", "m-cashew-plantation",
                     "m-SA-crop-type")  # fmt: skip
    for name in SETS:
        block = merge({"source": "geobench", "options": {"set": name}}, PAPER["datasets"][name])
        size, _ = geobench.estimate_size(config.DatasetConfig(**block), params)
        expected = six if name in multispectral else four if name == "m-chesapeake-landcover" else six[:rgb]
        assert [band.common_name for band in size.bands] == expected
        for backbone, count in (("hiera_200m", 3), ("prithvi_300m", len(expected)), ("dofa_300m", len(expected))):
            spec = get_spec(params.backbone(backbone))
            assert len(match_bands(backbone, spec, size.bands, 224).input_names) == count


def test_plan_estimates_every_stage(geobench_job, capsys):
    with geobench_job.changed({"grid": {"datasets": ["m-so2sat", "m-nz-cattle"]}}):
        plan()
    output = capsys.readouterr().out
    rows = [re.split(r"  +", line) for line in output.splitlines()]
    assert ["fetch", "m-so2sat: present"] in rows
    totals = {row[0]: row for row in rows if row[1:2] == ["total"]}
    assert set(totals) == {"prepare", "extract", "tune, train", "distill, export"}
    # 21,964 images of m-so2sat: six bands of 32 x 32 px in four bytes.
    row = next(row for row in rows if row[:2] == ["prepare", "m-so2sat"])
    assert row[2:4] == ["21964", f"{21964 * 6 * 32 * 32 * 4 / 1e9:.2f}"]
    assert row[4] != "–"
    assert re.search(r"Disk: [\d.]+ GB are needed, [\d.]+ GB are free", output)
