"""repro: `dvc repro` with two data sets at a time, and with stages whose imports are done (stages/warm.py).

DVC runs one stage after the other, and while it keeps its books, and in much of a stage, a core has nothing to do.
Data sets do not meet before the report: each has a `dvc repro` of its own here, and what is left, costs, which are
measured with nothing beside them, and the report, is done by the last one, which also ends as a plain `dvc repro`
would if anything failed.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from pipeline import config
from pipeline.config import GridConfig
from stages import lockfile, warm
from stages.cli import run

# Data sets at once. Heads of one keep two cores busy for half of the time; three are no faster (LAB.md).
_AT_ONCE = 2


def repro() -> None:
    """Run everything in params.yaml's grid; exits as `dvc repro` does."""
    grid = config.load().grid
    # torch's threads wait for one another by spinning, which takes the core that another stage needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with warm.waiting() as place:
        os.environ.update(place)
        lockfile.drop_absent()
        if _dvc("check") == 0:
            _side_by_side(["fetch_weights"], ["fetch", "prepare"])
            _side_by_side(*(cells(grid, dataset) for dataset in grid.datasets))
        if code := _dvc():
            sys.exit(code)


def cells(grid: GridConfig, dataset: str) -> list[str]:
    """DVC's names of a data set's stages from extraction to maps, each after those that it depends on."""
    return [
        *(f"extract@{dataset}-{backbone}" for backbone in grid.backbones),
        f"resolve@{dataset}",
        *(f"tune@{dataset}-{model}" for model in grid.models),
        *(f"train@{dataset}-{model}" for model in grid.models),
        f"compose@{dataset}",
        *(f"{stage}@{dataset}-{student}" for student in grid.students for stage in ("distill", "export", "map")),
    ]


def _side_by_side(*runs: list[str]) -> None:
    """Stages one by one: a DVC that walked upstream would want to write what another reads."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda targets: _dvc("--single-item", *targets), runs))


def _dvc(*targets: str) -> int:
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *targets]
    # It goes on if this process is killed; with this process's lock in hand it is waited for (stages/cli.py).
    return subprocess.run(command, close_fds=False).returncode


if __name__ == "__main__":
    run(repro)
