"""Stages that are removed from dvc.lock before a run, and stages that are kept."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stages import repro

STAGES = {
    name: {"cmd": f"echo {name} > {name}.txt", "deps": ["input.txt"], "outs": [f"{name}.txt"]}
    for name in ("one", "two")
}


def dvc(*arguments: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def locked_stages() -> list[str]:
    return sorted(yaml.safe_load(Path("dvc.lock").read_text())["stages"])


@pytest.fixture(scope="module")
def finished_folder(tmp_path_factory):
    """A pipeline of two finished stages; the output of the second was deleted."""
    folder = tmp_path_factory.mktemp("ran")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        dvc("init", "-q", "--no-scm")
        Path("dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
        Path("input.txt").write_text("input")
        dvc("repro")
        (out,) = yaml.safe_load(Path("dvc.lock").read_text())["stages"]["two"]["outs"]
        Path(".dvc/cache/files/md5", out["md5"][:2], out["md5"][2:]).unlink()
        shutil.rmtree(".dvc/cache/runs")
        Path("two.txt").unlink()
    return folder


@pytest.fixture
def finished(finished_folder, tmp_path, monkeypatch):
    """A copy of the folder as the working directory."""
    shutil.copytree(finished_folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert locked_stages() == ["one", "two"]


def test_drop_absent_stage_without_output_is_removed_and_runs(finished):
    original = yaml.safe_load(Path("dvc.lock").read_text())
    repro.drop_absent()
    reduced = yaml.safe_load(Path("dvc.lock").read_text())
    assert reduced == {**original, "stages": {"one": original["stages"]["one"]}}
    output = dvc("repro")
    assert "Running stage 'two'" in output
    assert "Running stage 'one'" not in output
    assert yaml.safe_load(Path("dvc.lock").read_text()) == original


def test_drop_absent_no_outputs_removes_all_stages(finished):
    Path("one.txt").unlink()
    shutil.rmtree(".dvc/cache")
    repro.drop_absent()
    assert locked_stages() == []
    dvc("repro")
    assert locked_stages() == ["one", "two"]


def test_drop_absent_cached_output_is_kept(finished):
    dvc("repro", "two")
    Path("two.txt").unlink()
    repro.drop_absent()
    assert locked_stages() == ["one", "two"]


def test_drop_absent_with_remote_keeps_all(finished, tmp_path):
    dvc("remote", "add", "-q", "storage", str(tmp_path / "remote"))
    repro.drop_absent()
    assert locked_stages() == ["one", "two"]


def test_drop_absent_without_lock_file_does_nothing(finished):
    Path("dvc.lock").unlink()
    repro.drop_absent()
    assert not Path("dvc.lock").exists()


UNREADABLE = [
    "", "stages:\n", "stages:\n  one:\n", "stages:\n  one: {\n", "<<<<<<< ours\n", "- a list\n", "schema: '2.0'\n",
]  # fmt: skip


@pytest.mark.parametrize("text", UNREADABLE)
def test_drop_absent_unreadable_file_is_unchanged(finished, text):
    Path("dvc.lock").write_text(text)
    repro.drop_absent()
    assert Path("dvc.lock").read_text() == text


def test_drop_absent_outside_a_repository_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    repro.drop_absent()
    assert Path("dvc.lock").read_text() == "schema: '2.0'\nstages: {}\n"
