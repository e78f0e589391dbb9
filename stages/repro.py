"""repro: run `dvc repro` for two datasets at a time, with preloaded imports (stages/warm.py).

DVC runs one stage at a time and leaves a core idle while it updates its files, and during parts of most stages.
Stages of different datasets are independent before the report, so each dataset has its own `dvc repro` here. A last
plain `dvc repro` runs the remaining stages: costs, which must be measured while nothing else runs, and the report. It
also reports failures of earlier stages.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from pipeline import config
from pipeline.config import GridConfig
from stages import lockfile, warm
from stages.cli import run

# Training heads of one dataset keeps two cores busy half of the time; three datasets are no faster (LAB.md).
PARALLEL_DATASETS = 2


def repro() -> None:
    """Run the grid of params.yaml; exit with the status of `dvc repro`."""
    grid = config.load().grid
    # Waiting threads of torch spin by default and occupy the core that another stage needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with warm.warm_process() as environment:
        os.environ.update(environment)
        lockfile.drop_absent()
        if _dvc("validate") == 0:
            _run_in_parallel(["fetch_weights"], ["fetch", "prepare"])
            _run_in_parallel(*(dataset_stages(grid, dataset) for dataset in grid.datasets))
        if code := _dvc():
            sys.exit(code)


def dataset_stages(grid: GridConfig, dataset: str) -> list[str]:
    """Return DVC's names of a dataset's stages from extraction to maps, in order of their dependencies."""
    return [
        *(f"extract@{dataset}-{backbone}" for backbone in grid.backbones),
        f"resolve@{dataset}",
        *(f"tune@{dataset}-{model}" for model in grid.models),
        *(f"train@{dataset}-{model}" for model in grid.models),
        f"compose@{dataset}",
        *(f"{stage}@{dataset}-{student}" for student in grid.students for stage in ("distill", "export", "map")),
    ]


def _run_in_parallel(*runs: list[str]) -> None:
    """Run lists of stages in parallel.

    Upstream stages are not run: two processes must not write the same files.
    """
    with ThreadPoolExecutor(PARALLEL_DATASETS) as pool:
        list(pool.map(lambda targets: _dvc("--single-item", *targets), runs))


def _dvc(*targets: str) -> int:
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *targets]
    # DVC continues if this process is killed; it inherits this process's lock, so the next run waits (stages/cli.py).
    return subprocess.run(command, close_fds=False).returncode


if __name__ == "__main__":
    run(repro)
