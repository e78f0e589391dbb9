"""Writers in other processes: kill -9 at random moments, and a disk that runs full."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_store import file_bytes, small_schema, write_store

FOLDER = Path(__file__).parent
SCRIPT = """
import json, subprocess, sys
from pathlib import Path
from small_store import shard_values, small_schema, write_store

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "small", disk], check=True)
schema = small_schema(samples=160, shard_size=16)
result = {"errno": None, "filename": None}
try:
    write_store(disk, schema)
except OSError as error:
    result = {"errno": error.errno, "filename": error.filename}
result["n_before"] = len(list((disk / "scratch/shards").glob("*.json")))
result["partial_files"] = [str(path) for path in disk.rglob("*.partial")]
result["is_published"] = (disk / "store.zarr").exists()
subprocess.run(["mount", "-o", "remount,size=30m", disk], check=True)
shards = []

def make_values(schema, shard, seed):
    shards.append(shard)
    return shard_values(schema, shard, seed)

write_store(disk, schema, make_values=make_values)
print(json.dumps({**result, "n_after": len(shards), "sums": (disk / "store.zarr/SHA256SUMS").read_text()}))
"""


def run_python(*command):
    """Run a Python process; returns the object that it prints as JSON, and its errors."""
    environment = os.environ | {"PYTHONPATH": f"{FOLDER.parents[1]}:{FOLDER}"}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout), process.stderr


@pytest.mark.parametrize("n_kills", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_writers_killed_at_random_moments_leave_whole_stores(tmp_path, n_kills):
    result, errors = run_python(sys.executable, FOLDER / "kills.py", tmp_path, str(n_kills))
    assert result["kills"] >= n_kills
    assert result["stores"] >= n_kills // 20, "too few stores were finished between kills"
    assert result["different"] == 0
    assert result["failed"] == 0, errors
    assert result["opened"] == result["whole"]


def test_writer_after_a_full_disk_names_the_file_and_resumes_with_the_missing_shards(tmp_path):
    write_store(tmp_path / "unbroken", small_schema(samples=160, shard_size=16))
    (tmp_path / "disk").mkdir()
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    result, _ = run_python(*namespace, sys.executable, "-c", SCRIPT, tmp_path / "disk")
    assert result["errno"] == 28  # ENOSPC
    assert "/scratch/" in result["filename"]
    assert 2 <= result["n_before"] < 10
    assert result["n_after"] == 10 - result["n_before"], "finished shards were written again"
    assert not result["partial_files"]
    assert not result["is_published"]
    assert result["sums"].encode() == file_bytes(tmp_path / "unbroken/store.zarr")["SHA256SUMS"]
