"""A disk that runs full: the error names the file, and no finished shard is written twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

from small_store import file_bytes, small_schema, write_store

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


def test_writer_after_a_full_disk_resumes_with_the_missing_shards(tmp_path):
    schema = small_schema(samples=160, shard_size=16)
    write_store(tmp_path / "unbroken", schema)
    (tmp_path / "disk").mkdir()
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    folder = Path(__file__).parent
    paths = {"PYTHONPATH": f"{folder.parents[1]}:{folder}"}
    command = [*namespace, sys.executable, "-c", SCRIPT, str(tmp_path / "disk")]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | paths)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["errno"] == 28  # ENOSPC
    assert "/scratch/" in result["filename"]
    assert 2 <= result["n_before"] < 10
    assert result["n_after"] == 10 - result["n_before"], "finished shards were written again"
    assert not result["partial_files"]
    assert not result["is_published"]
    assert result["sums"].encode() == file_bytes(tmp_path / "unbroken/store.zarr")["SHA256SUMS"]
