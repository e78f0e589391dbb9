"""What is dropped from dvc.lock before a run, and what never is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stages import lockfile

STAGES = {
    name: {"cmd": f"echo {name} > {name}.txt", "deps": ["given.txt"], "outs": [f"{name}.txt"]}
    for name in ("one", "two")
}


def dvc(*arguments: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def entered() -> list[str]:
    return sorted(yaml.safe_load(Path("dvc.lock").read_text())["stages"])


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A pipeline of two stages that ran; the output of the second is nowhere any more."""
    folder = tmp_path_factory.mktemp("ran")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        dvc("init", "-q", "--no-scm")
        Path("dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
        Path("given.txt").write_text("given")
        dvc("repro")
        (out,) = yaml.safe_load(Path("dvc.lock").read_text())["stages"]["two"]["outs"]
        Path(".dvc/cache/files/md5", out["md5"][:2], out["md5"][2:]).unlink()
        shutil.rmtree(".dvc/cache/runs")
        Path("two.txt").unlink()
    return folder


@pytest.fixture
def ran(once, tmp_path, monkeypatch):
    """A copy of it, to be in."""
    shutil.copytree(once, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert entered() == ["one", "two"]


def test_a_stage_of_which_nothing_is_here_is_dropped_and_runs(ran):
    before = yaml.safe_load(Path("dvc.lock").read_text())
    lockfile.drop_absent()
    after = yaml.safe_load(Path("dvc.lock").read_text())
    assert after == {**before, "stages": {"one": before["stages"]["one"]}}
    said = dvc("repro")
    assert "Running stage 'two'" in said
    assert "Running stage 'one'" not in said
    assert yaml.safe_load(Path("dvc.lock").read_text()) == before


def test_with_nothing_here_at_all_dvc_takes_what_is_left(ran):
    Path("one.txt").unlink()
    shutil.rmtree(".dvc/cache")
    lockfile.drop_absent()
    assert entered() == []
    dvc("repro")
    assert entered() == ["one", "two"]


def test_what_the_cache_has_stays(ran):
    dvc("repro", "two")
    Path("two.txt").unlink()
    lockfile.drop_absent()
    assert entered() == ["one", "two"]


def test_with_a_remote_nothing_is_dropped(ran, tmp_path):
    dvc("remote", "add", "-q", "kept", str(tmp_path / "remote"))
    lockfile.drop_absent()
    assert entered() == ["one", "two"]


def test_without_a_lock_there_is_nothing_to_do(ran):
    Path("dvc.lock").unlink()
    lockfile.drop_absent()
    assert not Path("dvc.lock").exists()


UNREADABLE = [
    "", "stages:\n", "stages:\n  one:\n", "stages:\n  one: {\n", "<<<<<<< ours\n", "- a list\n", "schema: '2.0'\n",
]  # fmt: skip


@pytest.mark.parametrize("text", UNREADABLE)
def test_what_dvc_cannot_read_is_left_to_dvc(ran, text):
    Path("dvc.lock").write_text(text)
    lockfile.drop_absent()
    assert Path("dvc.lock").read_text() == text


def test_outside_of_a_dvc_repository_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    lockfile.drop_absent()
    assert Path("dvc.lock").read_text() == "schema: '2.0'\nstages: {}\n"
