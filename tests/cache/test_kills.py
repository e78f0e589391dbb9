"""Kill -9 at a hundred random moments."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_writers_killed_at_random_moments_leave_whole_stores(tmp_path):
    folder = Path(__file__).parent
    command = [sys.executable, folder / "kills.py", tmp_path, "100"]
    paths = {"PYTHONPATH": f"{folder.parents[1]}:{folder}"}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | paths)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["kills"] >= 100
    assert result["stores"] >= 5, "too few stores were finished between kills"
    assert result["different"] == 0
    assert result["failed"] == 0, process.stderr
    assert result["opened"] == result["whole"] > 0
