"""A clone of the repository in a temporary folder, with a small grid, DVC, real data and weights."""

import contextlib
import io
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import networkx
import pytest
import yaml
from dvc.repo import Repo

from cache.errors import InputError
from tests.conftest import ROOT

SMALL = {
    "grid": {
        "datasets": ["sample-landuse-seg", "sample-trees"],
        "backbones": ["raw", "csmask_b4", "lite0"],
        "models": ["raw", "lite0", "csmask_b4+lite0"],
    },
    "datasets": {"sample-trees": {"chip": 128}},
    "composition": {"top_k": 2},
    "heads": {"segmentation": "upernet", "linear": {"steps": 20}, "upernet": {"steps": 4, "channels": 4}},
    "search": {"trials": 2, "trials_per_round": 1},
    "train": {"seeds": 2},
    "students": {"small": {"network": "test_resnet", "chip_size": 32, "mask_size": 64}},
    "distill": {"classification": {"steps": 4}, "segmentation": {"steps": 2, "batch": 4}, "search": {"trials": 1}},
    "backbones": {"csmask_b4": {"input_size": 64}, "lite0": {"input_size": 64}, "raw": {"input_size": 64}},
}


def merge(base: dict, change: dict) -> dict:
    """Return `base` with the keys of `change` set, at any depth."""
    return base | {k: merge(base.get(k) or {}, v) if isinstance(v, dict) else v for k, v in change.items()}


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups early when only tests/stages is collected
def pytest_collection_modifyitems(items):
    """Run all tests that share the job in one process, first: they take as long as all other tests."""

    def shares_job(item) -> bool:  # the tests of fine-tuning have another fixture of this name
        return item.path.parent == Path(__file__).parent and "job" in getattr(item, "fixturenames", ())

    items.sort(key=lambda item: not shares_job(item))
    for item in filter(shares_job, items):
        item.add_marker(pytest.mark.xdist_group("job"))


class Job:
    """A clone of the repository with its own DVC cache, and the commands of a user."""

    def __init__(self, folder: Path):
        self.folder = folder
        # Stages run with the Python of the tests, not with another one in PATH.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        author = {f"GIT_{role}_{key}": "t" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
        self.environment = {**os.environ, **author, "PATH": path, "PYTHONPATH": str(folder)}
        self.options = {"cwd": folder, "env": self.environment}

    def run(self, *command: str, fails: bool = False) -> str:
        """Run a command and return its output; it must succeed, or fail if `fails`."""
        result = subprocess.run(command, **self.options, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert (result.returncode != 0) == fails, result.stdout[-3000:]
        return result.stdout

    def stage(self, name: str, *arguments: str) -> str:
        """Run a stage as `python -m` does, but in this process, to save imports; return its output."""
        output, exit_error = self._run_stage(name, *arguments)
        assert exit_error is None, exit_error.code
        return output

    def stage_error(self, name: str, *arguments: str) -> InputError:
        """Run a stage that must refuse its input with one printed paragraph; return the error."""
        output, exit_error = self._run_stage(name, *arguments)
        assert exit_error is not None, output[-3000:]
        assert exit_error.code.startswith("error: ")
        assert "\n" not in exit_error.code
        assert "Traceback" not in output
        error = exit_error.__context__
        assert isinstance(error, InputError)
        return error

    def _run_stage(self, name: str, *arguments: str) -> tuple[str, SystemExit | None]:
        output, exit_error = io.StringIO(), None
        argv = [f"stages/{name}.py", *arguments]
        with contextlib.chdir(self.folder), patch("sys.argv", argv), redirect_stdout(output), redirect_stderr(output):
            try:
                runpy.run_path(str(ROOT / f"stages/{name}.py"), run_name="__main__")
            except SystemExit as error:
                exit_error = error
        return output.getvalue(), exit_error

    def start(self, *command: str, stderr: int = subprocess.DEVNULL) -> subprocess.Popen:
        """Start a command in its own process group."""
        streams = {"stdout": subprocess.DEVNULL, "stderr": stderr}
        return subprocess.Popen(command, **self.options, **streams, start_new_session=True)

    def change(self, change: dict) -> None:
        """Set keys of params.yaml."""
        path = self.folder / "params.yaml"
        path.write_text(yaml.safe_dump(merge(yaml.safe_load(path.read_text()), change), sort_keys=False))

    @contextmanager
    def changed(self, change: dict):
        """Set keys of params.yaml for the duration of the block."""
        path = self.folder / "params.yaml"
        original = path.read_text()
        self.change(change)
        try:
            yield
        finally:
            path.write_text(original)

    @contextmanager
    def repository(self):
        """Open DVC's repository in this process, which saves a second of imports a command."""
        with contextlib.chdir(self.folder), Repo() as repo:
            yield repo

    def run_grid(self) -> None:
        """Run all stages in this process, in a third of the time of `dvc repro`, and record them."""
        with self.repository() as repo:
            commands = [stage.cmd for stage in networkx.dfs_postorder_nodes(repo.index.graph)]
        for command in commands:
            _, _, module, *arguments = shlex.split(command)
            self.stage(module.removeprefix("stages."), *arguments)
        self.commit()

    def commit(self, *targets: str) -> None:
        """Record the results of all stages, or of some, as those that belong to params.yaml."""
        with self.repository() as repo:
            for target in targets or (None,):
                repo.commit(target, force=True)

    def planned(self, *targets: str, **options: bool) -> list[str]:
        """Return the stages that `dvc repro` would run now, up to the targets."""
        with self.repository() as repo:
            return [stage.addressing for stage in repo.reproduce(targets or None, dry=True, **options)]


def clone(folder: Path, archive_folder: Path) -> Job:
    """Copy the repository without results to a folder, with the small grid."""
    list_files = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(list_files, cwd=ROOT, text=True).splitlines():
        if (ROOT / name).exists() and name != "dvc.lock" and not name.startswith("results/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "data").mkdir()
    (folder / "data/archives").symlink_to(archive_folder)
    job = Job(folder)
    job.run("git", "init", "-q", "-b", "main")
    job.change(SMALL)
    return job


@pytest.fixture(scope="package")
def job(tmp_path_factory, weights_folder, raw_folder):
    """The small grid, run through to the report; tests leave params.yaml unchanged."""
    weights_folder("csmask_b4"), weights_folder("lite0"), raw_folder("osm_landuse"), raw_folder("neon_trees")
    small_grid = clone(tmp_path_factory.mktemp("job"), ROOT / "data/archives")
    small_grid.run_grid()
    small_grid.run("git", "add", "-A")
    small_grid.run("git", "commit", "-qm", "small grid")
    return small_grid


@pytest.fixture
def fresh_clone(tmp_path, weights_folder, raw_folder):
    """A clone in which nothing has run yet."""
    weights_folder("lite0"), raw_folder("neon_trees")
    return clone(tmp_path, ROOT / "data/archives")
