"""repro: `dvc repro` with two data sets at a time.

DVC runs one stage after the other, and while a stage imports torch, or DVC keeps its books, a core has nothing to do.
Data sets do not meet before the report: each has a `dvc repro` of its own here, and what is left, exports and maps,
costs and the report, is done by the last one, which also ends as a plain `dvc repro` would if anything failed.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from pipeline import params
from pipeline.params import Grid
from stages.cli import run

# Data sets at once. Heads of one keep two cores busy for half of the time.
_AT_ONCE = 2


def repro() -> None:
    """Run everything in params.yaml's grid; exits as `dvc repro` does."""
    grid = params.load().grid
    if _dvc("check", "fetch_weights") == 0:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            # One by one: a DVC that walks upstream would want to write what the other reads.
            list(pool.map(lambda dataset: _dvc("--single-item", *cells(grid, dataset)), grid.datasets))
    if code := _dvc():
        sys.exit(code)


def cells(grid: Grid, dataset: str) -> list[str]:
    """DVC's names of a data set's stages, each after those that it depends on.

    Not of export and map, whose times, which are reported, other work beside them would spoil.
    """
    return [
        f"fetch@{dataset}",
        f"prepare@{dataset}",
        *(f"extract@{dataset}-{backbone}" for backbone in grid.backbones),
        f"resolve@{dataset}",
        *(f"tune@{dataset}-{model}" for model in grid.models),
        *(f"train@{dataset}-{model}" for model in grid.models),
        f"compose@{dataset}",
        *(f"distill@{dataset}-{student}" for student in grid.students),
    ]


def _dvc(*targets: str) -> int:
    # torch's threads wait for one another by spinning, which takes the core that another stage needs.
    calm = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run([sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *targets], env=calm).returncode


if __name__ == "__main__":
    run(repro)
