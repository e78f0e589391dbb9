"""Stages in forks of a warm process behave like stages in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages import warm

ROOT = Path(__file__).parents[2]
# Prints whether torch was imported before it, and which process runs it.
STAGE = """
import json, os, sys, threading
report = {"torch": "torch" in sys.modules, "argv": sys.argv[1:], "cwd": os.getcwd()}
report["greeting"] = os.environ.get("GREETING")
print(json.dumps(report | {"pid": os.getpid(), "threads": threading.active_count()}))
print("to standard error", file=sys.stderr)
if "fail" in sys.argv: sys.exit("error: one paragraph")
if "raise" in sys.argv: raise ValueError("a fault")
if "die" in sys.argv: os.kill(os.getpid(), 9)
if "seven" in sys.argv: sys.exit(7)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("warm")
    (path / "stages").mkdir()
    for name in ("__init__.py", "warm.py"):
        (path / "stages" / name).write_text((ROOT / "stages" / name).read_text())
    (path / "stages/reporter.py").write_text(STAGE)
    return path


@pytest.fixture(scope="module")
def environment(folder):
    """A waiting process, and the environment variable of its clients."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        with warm.warm_process() as variables:
            deadline = time.monotonic() + 120
            while not Path(variables[warm.SOCKET_VARIABLE]).exists():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield variables


def run_stage(folder, environment, *arguments, **variables):
    command = [sys.executable, "-m", "stages.reporter", *arguments]
    env = {**os.environ, **environment, **variables}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_fork_has_the_imports_and_the_environment_of_the_client(folder, environment):
    result = run_stage(folder, environment, "--dataset", "d", GREETING="hello")
    report = json.loads(result.stdout)
    assert (result.returncode, result.stderr) == (0, "to standard error\n")
    assert report["torch"]
    assert report["threads"] == 1
    assert (report["argv"], report["cwd"], report["greeting"]) == (["--dataset", "d"], str(folder), "hello")
    assert json.loads(run_stage(folder, environment).stdout)["pid"] != report["pid"]


@pytest.mark.parametrize(("argument", "status", "message"), [
    ("fail", 1, "error: one paragraph"), ("raise", 1, "ValueError: a fault"), ("die", 1, ""), ("seven", 7, ""),
])  # fmt: skip
def test_fork_exit_status_is_that_of_the_stage(folder, environment, argument, status, message):
    result = run_stage(folder, environment, argument)
    assert result.returncode == status
    assert message in result.stderr
    if argument != "die":
        direct = run_stage(folder, {}, argument)
        assert (direct.returncode, direct.stderr.splitlines()[-1]) == (status, result.stderr.splitlines()[-1])


def test_stage_without_a_warm_process_imports_for_itself(folder, tmp_path):
    for environment in ({}, {warm.SOCKET_VARIABLE: str(tmp_path / "none")}):
        assert not json.loads(run_stage(folder, environment).stdout)["torch"]


def test_warm_process_ends_with_its_parent(folder):
    # Without torch, whose import other tests cover.
    light = (folder / "stages/warm.py").read_text().replace('"torch", "timm"', '"json"')
    (folder / "stages/light.py").write_text(light.replace('"stages.warm"', '"stages.light"'))
    code = (
        "import time; from stages import light\n"
        "with light.warm_process() as variables: print(variables[light.SOCKET_VARIABLE], flush=True); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, text=True) as starter:
        socket_path = Path(starter.stdout.readline().strip())
        deadline = time.monotonic() + 120
        while not socket_path.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        starter.send_signal(signal.SIGKILL)
        assert socket_path.exists()
    deadline = time.monotonic() + 20
    while (
        time.monotonic() < deadline and subprocess.run(["pgrep", "-f", str(socket_path)], capture_output=True).stdout
    ):
        time.sleep(0.1)
    assert not subprocess.run(["pgrep", "-f", str(socket_path)], capture_output=True).stdout
