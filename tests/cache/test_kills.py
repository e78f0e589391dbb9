"""Kill -9 at a hundred random moments."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_kill_9_at_a_hundred_random_moments(tmp_path):
    command = [sys.executable, Path(__file__).with_name("kills.py"), tmp_path, "100"]
    here = Path(__file__).parent
    paths = {"PYTHONPATH": f"{here.parents[1]}:{here}"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | paths)
    assert ended.returncode == 0, ended.stderr
    seen = json.loads(ended.stdout)
    assert seen["kills"] >= 100
    assert seen["stores"] >= 5, "too few were finished between kills to say anything"
    assert seen["different"] == 0
    assert seen["failed"] == 0, ended.stderr
    assert seen["opened"] == seen["whole"] > 0
