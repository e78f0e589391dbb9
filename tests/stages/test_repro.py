"""Data sets side by side, as `make run` has them: the job is made so."""

import sys
import time

import pandas as pd
import pytest

from pipeline import config
from stages.repro import dataset_stages
from tests.stages.test_job import stages_of


def test_every_stage_is_of_a_data_set_or_left_to_the_last_run(job):
    grid = config.load(job.folder / "params.yaml").grid
    listed = set(job.run("dvc", "stage", "list", "--name-only").split())
    mine = [name for dataset in grid.datasets for name in dataset_stages(grid, dataset)]
    assert len(mine) == len(set(mine))
    left = {name.split("@")[0] for name in listed - set(mine)}
    assert set(mine) < listed
    assert left == {"check", "fetch_weights", "fetch", "prepare", "cost", "report"}


def test_a_stage_comes_after_those_that_it_depends_on(job):
    grid = config.load(job.folder / "params.yaml").grid
    for dataset in grid.datasets:
        order = dataset_stages(grid, dataset)
        lines = job.run("dvc", "dag", "--dot", order[-1]).splitlines()
        edges = [line.strip().rstrip(";").replace('"', "").split(" -> ") for line in lines if "->" in line]
        within = [(one, two) for one, two in edges if one in order and two in order]
        assert within
        assert all(order.index(one) < order.index(two) for one, two in within)


def test_nothing_is_left_to_do_and_a_mistake_ends_in_one_paragraph(job):
    assert "Data and pipelines are up to date" in job.run("dvc", "repro")
    with job.changed({"grid": {"models": ["nope"]}}):
        said = job.run(sys.executable, "-m", "stages.repro", fails=True)
    assert said.startswith("error: ")
    assert "nope" in said


@pytest.mark.slow
def test_a_killed_run_is_waited_for_by_the_next(job):
    """Only the first process is killed: DVC and the stage that it runs go on, and hold what they write."""
    with job.changed({"train": {"seeds": 3}}):
        process = job.start(sys.executable, "-m", "stages.repro")
        while process.poll() is None and not any("stages.train" in one.cmdline() for one in stages_of(process)):
            time.sleep(0.01)
        process.kill()
        assert process.wait() < 0
        said = job.run(sys.executable, "-m", "stages.repro")
        assert "waiting for another process that runs repro" in said
        runs = pd.read_csv(job.folder / "results/runs/sample-trees/lite0/runs.csv")
        assert sorted(runs.seed) == [0, 1, 2]
    job.run(sys.executable, "-m", "stages.repro")
