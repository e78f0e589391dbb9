"""Stages run by copies of a process that waits, and what users and DVC see of them: the same as without."""

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
# A stage of its own, which says whether torch was there before it, and who runs it.
STAGE = """
import json, os, sys, threading
here = {"torch": "torch" in sys.modules, "argv": sys.argv[1:], "cwd": os.getcwd(), "said": os.environ.get("SAID")}
print(json.dumps(here | {"pid": os.getpid(), "threads": threading.active_count()}))
print("to standard error", file=sys.stderr)
if "fail" in sys.argv: sys.exit("error: one paragraph")
if "raise" in sys.argv: raise ValueError("a fault")
if "die" in sys.argv: os.kill(os.getpid(), 9)
if "seven" in sys.argv: sys.exit(7)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("warm")
    (made / "stages").mkdir()
    for name in ("__init__.py", "warm.py"):
        (made / "stages" / name).write_text((ROOT / "stages" / name).read_text())
    (made / "stages/told.py").write_text(STAGE)
    return made


@pytest.fixture(scope="module")
def waiting(folder):
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        with warm.warm_process() as place:
            until = time.monotonic() + 120
            while not Path(place[warm.SOCKET_VARIABLE]).exists():
                assert time.monotonic() < until
                time.sleep(0.1)
            yield place


def told(folder, place, *arguments, **environment):
    command = [sys.executable, "-m", "stages.told", *arguments]
    surroundings = {**os.environ, **place, **environment}
    return subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True)


def test_a_copy_has_the_imports_and_all_else_is_the_callers(folder, waiting):
    done = told(folder, waiting, "--dataset", "d", SAID="hello")
    here = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "to standard error\n")
    assert here["torch"]
    assert here["threads"] == 1
    assert (here["argv"], here["cwd"], here["said"]) == (["--dataset", "d"], str(folder), "hello")
    assert json.loads(told(folder, waiting).stdout)["pid"] != here["pid"]


@pytest.mark.parametrize(("how", "status", "says"), [
    ("fail", 1, "error: one paragraph"), ("raise", 1, "ValueError: a fault"), ("die", 1, ""), ("seven", 7, ""),
])  # fmt: skip
def test_it_ends_as_the_stage_ends(folder, waiting, how, status, says):
    done = told(folder, waiting, how)
    assert done.returncode == status
    assert says in done.stderr
    if how != "die":
        alone = told(folder, {}, how)
        assert (alone.returncode, alone.stderr.splitlines()[-1]) == (status, done.stderr.splitlines()[-1])


def test_without_one_a_stage_imports_for_itself(folder, tmp_path):
    for place in ({}, {warm.SOCKET_VARIABLE: str(tmp_path / "none")}):
        assert not json.loads(told(folder, place).stdout)["torch"]


def test_it_ends_with_whoever_started_it(folder):
    # Importing is another test's.
    light = (folder / "stages/warm.py").read_text().replace('"torch", "timm"', '"json"')
    (folder / "stages/light.py").write_text(light.replace('"stages.warm"', '"stages.light"'))
    code = (
        "import time; from stages import light\n"
        "with light.waiting() as place: print(place[light.PLACE], flush=True); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, text=True) as starter:
        place = Path(starter.stdout.readline().strip())
        until = time.monotonic() + 120
        while not place.exists() and time.monotonic() < until:
            time.sleep(0.1)
        starter.send_signal(signal.SIGKILL)
        assert place.exists()
    until = time.monotonic() + 20
    while time.monotonic() < until and subprocess.run(["pgrep", "-f", str(place)], capture_output=True).stdout:
        time.sleep(0.1)
    assert not subprocess.run(["pgrep", "-f", str(place)], capture_output=True).stdout
