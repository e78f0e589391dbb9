"""Datasets in parallel, as in `make run`; the fixture `job` runs this way too."""

import sys
import time

import pandas as pd
import pytest

from pipeline import config
from stages.repro import dataset_stages
from tests.stages.test_job import stages_of


def test_dataset_stages_are_all_stages_of_a_dataset(job):
    grid = config.load(job.folder / "params.yaml").grid
    listed = set(job.run("dvc", "stage", "list", "--name-only").split())
    stages = [name for dataset in grid.datasets for name in dataset_stages(grid, dataset)]
    assert len(stages) == len(set(stages))
    other_stages = {name.split("@")[0] for name in listed - set(stages)}
    assert set(stages) < listed
    assert other_stages == {"validate", "fetch_weights", "fetch", "prepare", "cost", "report"}


def test_dataset_stages_follow_their_dependencies(job):
    grid = config.load(job.folder / "params.yaml").grid
    for dataset in grid.datasets:
        order = dataset_stages(grid, dataset)
        lines = job.run("dvc", "dag", "--dot", order[-1]).splitlines()
        edges = [line.strip().rstrip(";").replace('"', "").split(" -> ") for line in lines if "->" in line]
        inner_edges = [edge for edge in edges if set(edge) <= set(order)]
        assert inner_edges
        assert all(order.index(first) < order.index(second) for first, second in inner_edges)


def test_repro_finished_job_runs_nothing(job):
    assert "Running stage" not in job.run("dvc", "repro")


def test_repro_unknown_backbone_ends_in_one_paragraph(job):
    with job.changed({"grid": {"models": ["nope"]}}):
        output = job.run(sys.executable, "-m", "stages.repro", fails=True)
    assert output.startswith("error: ")
    assert "nope" in output


@pytest.mark.slow
def test_repro_killed_run_is_waited_for_by_the_next(job):
    """Only the first process is killed; DVC and its stage continue and keep their locks."""
    with job.changed({"train": {"seeds": 3}}):
        process = job.start(sys.executable, "-m", "stages.repro")
        while process.poll() is None and not any("stages.train" in stage.cmdline() for stage in stages_of(process)):
            time.sleep(0.01)
        process.kill()
        assert process.wait() < 0
        output = job.run(sys.executable, "-m", "stages.repro")
        assert "waiting" in output
        runs = pd.read_csv(job.folder / "results/runs/sample-trees/lite0/runs.csv")
        assert sorted(runs.seed) == [0, 1, 2]
    job.run(sys.executable, "-m", "stages.repro")
