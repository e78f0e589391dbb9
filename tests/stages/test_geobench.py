"""GEO-Bench and the paper's profile through the stages: all twelve sets to a report, and the whole grid's plan."""

import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import xarray as xr
import yaml

from pipeline import config
from pipeline.data.sources import geobench
from stages import compose, cost, distill, export, extract, fetch, prepare, report, resolve, train, tune
from stages.plan import plan
from tests.conftest import ROOT
from tests.stages.conftest import merge

SETS = list(geobench.SETS)
TAUGHT = ["m-bigearthnet", "m-so2sat", "m-nz-cattle"]  # one of each task
SMALL = {
    "grid": {"datasets": SETS, "backbones": ["raw"], "models": ["raw"]},
    "backbones": {"raw": {"input_size": 64}},
    "heads": {"linear": {"steps": 5, "batch": 4}, "upernet": {"steps": 2, "channels": 4, "batch": 2}},
    "search": {"trials": 1, "parallel": 1},
    "train": {"seeds": 1},
    "students": {"small": {"network": "test_resnet", "chip_size": 32, "mask_size": 32}},
    "distill": {
        "datasets": TAUGHT, "teacher": "raw", "chips": {"steps": 1, "batch": 4}, "masks": {"steps": 1, "batch": 2},
        "seeds": 1, "search": {"trials": 1},
    },
}  # fmt: skip
PAPER = yaml.safe_load((ROOT / "profiles/paper.yaml").read_text())


@pytest.fixture
def place(tmp_path, monkeypatch, geobench_root):
    """A folder with a params.yaml alone: the committed one with the paper's bands, small heads and the files."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content = merge(merge(content, {"datasets": PAPER["datasets"]}), SMALL | {"geobench_dir": str(geobench_root)})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def changed(change):
    """params.yaml with a change, for as long as the block lasts."""
    before = Path("params.yaml").read_text()
    Path("params.yaml").write_text(yaml.safe_dump(merge(yaml.safe_load(before), change)))
    yield
    Path("params.yaml").write_text(before)


def test_all_twelve_sets_go_through_to_a_report(place, capsys):
    for backbone in SMALL["grid"]["backbones"]:
        fetch.fetch(None, backbone)
    for name in SETS:
        fetch.fetch(name, None)
        prepare.prepare(name, False)
        for backbone in SMALL["grid"]["backbones"]:
            extract.extract(name, backbone)
        resolve.resolve(name)
        for model in SMALL["grid"]["models"]:
            tune.tune(name, model)
            train.train(name, model)
        compose.compose(name)
    for name in TAUGHT:
        distill.distill(name, "small")
        taught = pd.read_csv(f"results/distill/{name}/small/runs.csv")
        assert taught.model.tolist() == ["small (distilled)", "small (supervised)"]
        assert taught.score.between(0, 1).all()
    # The small grid exports, prices and maps the other tasks' students (test_map.py); the report also wants maps.
    with changed({"distill": {"datasets": TAUGHT[:1]}}):
        export.export("small", TAUGHT[0], False)
        cost.cost()
    assert set(pd.read_csv("results/cost.csv").model) == {"small", "raw"}
    with changed({"grid": {"students": []}}):
        report.make_report()
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
        assert store.wavelength.notnull().all(), "optical bands alone"
        assert not list(Path("data/raw", name).glob("*.hdf5")), "files are read where they are"


def test_a_damaged_file_from_the_command_line(job, geobench_root, tmp_path):
    """`--skip-bad` lists what it left out; without it, the error names the file."""
    shutil.copytree(geobench_root / "classification_v1.0/m-so2sat", tmp_path / "m-so2sat")
    (tmp_path / "m-so2sat/id_0003.hdf5").write_bytes(b"nothing")
    with job.changed({"geobench_dir": str(tmp_path)}):
        job.stage("fetch", "--dataset", "m-so2sat")
        said = job.stage("prepare", "--dataset", "m-so2sat", fails=True)
        assert f"error: {tmp_path}/m-so2sat/id_0003.hdf5 cannot be read" in said
        assert "Traceback" not in said
        said = job.stage("prepare", "--dataset", "m-so2sat", "--skip-bad")
        assert "left out id_0003" in said
        assert "{'train': 5, 'val': 4, 'test': 4}" in said


def test_the_papers_profile_is_planned_whole(fresh):
    """`dvc repro --dry` of the whole grid; by itself DVC would look in its run cache for files yet to be made."""
    shutil.copy(ROOT / "params.yaml", fresh.folder)
    fresh.stage("profile", "--name", "paper")
    planned = re.findall(r"Running stage '([^']+)'", fresh.run("dvc", "repro", "--dry", "--force-downstream"))
    verbs = [name.split("@")[0] for name in planned]
    counted = {
        verb: verbs.count(verb)
        for verb in ("fetch", "fetch_weights", "prepare", "extract", "tune", "train", "compose")
    }
    assert counted == {
        "fetch": 12,
        "fetch_weights": 4,
        "prepare": 12,
        "extract": 48,
        "tune": 96,
        "train": 96,
        "compose": 12,
    }
    described = config.load(fresh.folder / "params.yaml")
    assert (described.search.trials, described.train.seeds) == (16, 10)
    assert {described.backbone(name).input_size for name in described.grid.backbones} == {224}
    assert set(described.grid.datasets) == set(SETS)
    assert "# family: a file in pipeline/backbones" in (fresh.folder / "params.yaml").read_text(), "comments stay"
    assert "There is no profile 'papre'. Profiles: paper" in fresh.stage("profile", "--name", "papre", fails=True)


def test_the_papers_table_2(params):
    """Bands of each model and set: RGB for Hiera everywhere; what Prithvi and DOFA see is the set's."""
    from pipeline.backbones import get_spec
    from pipeline.bands import match_bands

    six, four, rgb = ["blue", "green", "red", "nir08", "swir16", "swir22"], ["blue", "green", "red", "nir"], 3
    multispectral = ("m-bigearthnet", "m-so2sat", "m-brick-kiln", "m-forestnet", "m-eurosat", "m-cashew-plantation",
                     "m-SA-crop-type")  # fmt: skip
    for name in SETS:
        block = merge({"source": "geobench", "options": {"set": name}}, PAPER["datasets"][name])
        wanted, _ = geobench.estimate_size(config.DatasetConfig(**block), params)
        expected = six if name in multispectral else four if name == "m-chesapeake-landcover" else six[:rgb]
        assert [band.common_name for band in wanted.bands] == expected
        for backbone, count in (("hiera_200m", 3), ("prithvi_300m", len(expected)), ("dofa_300m", len(expected))):
            chosen = params.backbone(backbone)
            assert len(match_bands(backbone, get_spec(chosen), wanted.bands, 224).input_names) == count


def test_the_plan_says_what_a_grid_takes(place, capsys):
    plan()
    said = capsys.readouterr().out
    assert "fetch  m-so2sat: is there" in said
    rows = [re.split(r"  +", line) for line in said.splitlines()]
    totals = {row[0]: row for row in rows if "in all" in row}
    assert set(totals) == {"prepare", "extract", "tune, train", "distill, export"}
    # 21 964 images of m-so2sat: six bands of 32 px in four bytes.
    row = next(row for row in rows if row[:2] == ["prepare", "m-so2sat"])
    assert row[2:4] == ["21964", f"{21964 * 6 * 32 * 32 * 4 / 1e9:.2f}"]
    assert row[4] != "–"
    assert re.search(r"Disk: [\d.]+ GB are needed, [\d.]+ GB are free", said)
