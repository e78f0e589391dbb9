"""The program itself in a fresh folder: committed files, a small grid, DVC, real data and weights."""

import io
import os
import runpy
import shutil
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

SMALL = {
    "grid": {
        "datasets": ["sample-landuse-seg", "sample-trees"],
        "backbones": ["raw", "csmask_b4", "lite0"],
        "models": ["raw", "lite0", "csmask_b4+lite0"],
    },
    "heads": {"linear": {"steps": 20}, "upernet": {"steps": 4, "channels": 4}},
    "search": {"trials": 2, "parallel": 1},
    "train": {"seeds": 2},
    "students": {"small": {"network": "test_resnet", "chip_size": 32, "mask_size": 64}},
    "distill": {"chips": {"steps": 4}, "masks": {"steps": 2, "batch": 4}, "search": {"trials": 1}},
    "backbones": {"csmask_b4": {"input_size": 64}, "lite0": {"input_size": 64}, "raw": {"input_size": 64}},
}


def merge(base: dict, change: dict) -> dict:
    """`base` with the keys of `change` set, at any depth."""
    return {
        **base,
        **{k: merge(base.get(k) or {}, v) if isinstance(v, dict) else v for k, v in change.items()},
    }


@pytest.hookimpl(tryfirst=True)  # or xdist reads the groups before, when tests/stages alone is asked for
def pytest_collection_modifyitems(items):
    """One process runs all that share the job, from the beginning: they take as long as all others together."""

    def shares(item) -> bool:  # fine-tuning's tests have a fixture of this name too
        return item.path.parent == Path(__file__).parent and "job" in getattr(item, "fixturenames", ())

    items.sort(key=lambda item: not shares(item))
    for item in filter(shares, items):
        item.add_marker(pytest.mark.xdist_group("job"))


class Job:
    """A clone of the repository with its own DVC cache, and what a user does in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        # Stages run with the tests' own Python, whatever PATH says.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        author = {
            "GIT_AUTHOR_NAME": "t",
            "GIT_AUTHOR_EMAIL": "t@t",
            "GIT_COMMITTER_NAME": "t",
            "GIT_COMMITTER_EMAIL": "t@t",
        }
        self.environment = {**os.environ, **author, "PATH": path, "PYTHONPATH": str(folder)}

    def run(self, *command: str, fails: bool = False) -> str:
        """The output of a command that must succeed, or must fail."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert (done.returncode != 0) == fails, done.stdout[-3000:]
        return done.stdout

    def stage(self, name: str, *arguments: str, fails: bool = False) -> str:
        """The output of a stage's file run as `python -m` runs it, but in this process, where imports are done."""
        said, ended = io.StringIO(), None
        with pytest.MonkeyPatch.context() as patched, redirect_stdout(said), redirect_stderr(said):
            patched.chdir(self.folder)
            patched.setattr(sys, "argv", [f"stages/{name}.py", *arguments])
            try:
                runpy.run_path(str(ROOT / f"stages/{name}.py"), run_name="__main__")
            except SystemExit as end:
                ended = end.code
        assert isinstance(ended, str) == fails, ended or said.getvalue()[-3000:]
        return said.getvalue() + (ended or "")

    def start(self, *command: str) -> subprocess.Popen:
        """A command in a process group of its own, to be killed whole."""
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def change(self, change: dict) -> None:
        path = self.folder / "params.yaml"
        path.write_text(yaml.safe_dump(merge(yaml.safe_load(path.read_text()), change), sort_keys=False))

    @contextmanager
    def changed(self, change: dict):
        """The change to params.yaml for as long as the block lasts."""
        path = self.folder / "params.yaml"
        before = path.read_text()
        self.change(change)
        try:
            yield
        finally:
            path.write_text(before)

    def results(self) -> dict[str, bytes]:
        """Every file that the report, the runs and the manifests consist of."""
        found = {}
        for name in ("results", "data/manifests"):
            for path in sorted((self.folder / name).rglob("*")):
                if path.is_file() and path.name != ".gitignore":
                    found[str(path.relative_to(self.folder))] = path.read_bytes()
        return found


def clone(folder: Path, archive_folder: Path) -> Job:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
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
    """The small grid, run through to the report; tests leave params.yaml as they found it."""
    weights_folder("csmask_b4"), weights_folder("lite0"), raw_folder("osm_landuse"), raw_folder("neon_trees")  # the archives are at hand
    made = clone(tmp_path_factory.mktemp("job"), ROOT / "data/archives")
    made.log = made.run(sys.executable, "-m", "stages.repro")
    made.run("git", "add", "-A")
    made.run("git", "commit", "-qm", "small grid")
    return made


@pytest.fixture
def fresh(tmp_path, weights_folder, raw_folder):
    """A clone in which nothing has run yet."""
    weights_folder("lite0"), raw_folder("neon_trees")
    return clone(tmp_path, ROOT / "data/archives")
