"""repro: run `dvc repro` for two datasets at a time, with preloaded imports (stages/warm.py).

DVC runs one stage at a time and leaves a core idle while it updates its files, and during parts of most stages.
Stages of different datasets are independent before the report, so each dataset has a separate `dvc repro`. A last
plain `dvc repro` runs the remaining stages: costs, which must be measured while nothing else runs, and the report. It
also reports failures of earlier stages.

Before the run, stages without outputs on this machine are removed from dvc.lock. DVC reads and writes all of dvc.lock
after every stage, which takes 2 s of CPU time with the default grid's 100 stages (LAB.md). In a fresh clone, dvc.lock
records results of another machine, and it keeps stages that were removed from the grid. Stages removed from dvc.lock
run either way and are recorded when they end.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.utils.serialize import dumps_yaml, load_yaml

from pipeline import config
from pipeline.config import GridConfig
from stages import warm
from stages.cli import run, write_text

LOCK = Path("dvc.lock")
# Training heads of one dataset keeps two cores busy half of the time; three datasets are no faster (LAB.md).
PARALLEL_DATASETS = 2


def repro() -> None:
    """Run the grid of params.yaml; exit with the status of `dvc repro`."""
    grid = config.load().grid
    # Waiting threads of torch spin by default and occupy the core that another stage needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with warm.warm_process() as environment:
        os.environ.update(environment)
        drop_absent()
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


# dvc.lock


def drop_absent() -> None:
    """Keep only the stages in dvc.lock that have an output in this folder or in DVC's cache.

    With a DVC remote nothing is removed, because `dvc pull` reads from dvc.lock what to download. Errors of reading
    or writing are ignored, because DVC reports them.
    """
    try:
        with Repo(_wait_for_lock=True) as repo, repo.lock:
            if LOCK.exists() and not repo.config["remote"]:
                _drop_entries(load_yaml(LOCK), repo.cache.local.exists)
    except (DvcException, OSError):
        return


def _drop_entries(content: dict, cached: Callable[[str], bool]) -> None:
    stages = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(stages, dict):
        return
    present = {name: entry for name, entry in stages.items() if _has_output(entry, cached)}
    if len(present) < len(stages):
        write_text(LOCK, dumps_yaml({**content, "stages": present}))


def _has_output(entry: dict | None, cached: Callable[[str], bool]) -> bool:
    """Return whether an output exists here; True for stages without outputs or with uncached ones."""
    outs = (entry or {}).get("outs") or ()
    return not outs or any("md5" not in out or Path(out["path"]).exists() or cached(out["md5"]) for out in outs)


if __name__ == "__main__":
    run(repro)
