"""Kill -9 at random moments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("n_kills", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_writers_killed_at_random_moments_leave_whole_stores(tmp_path, n_kills):
    folder = Path(__file__).parent
    command = [sys.executable, folder / "kills.py", tmp_path, str(n_kills)]
    paths = {"PYTHONPATH": f"{folder.parents[1]}:{folder}"}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | paths)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["kills"] >= n_kills
    assert result["stores"] >= n_kills // 20, "too few stores were finished between kills"
    assert result["different"] == 0
    assert result["failed"] == 0, process.stderr
    assert result["opened"] == result["whole"]
