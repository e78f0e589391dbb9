"""A disk that is full in the middle: a clear error, and nothing to do twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

from small_store import content, layout, write

SCRIPT = """
import json, subprocess, sys
from pathlib import Path
from small_store import content, layout, write

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "small", disk], check=True)
described = layout(samples=600, shard=16)
try:
    write(disk, described)
except OSError as error:
    said = str(error)
done = len(list((disk / "scratch/shards").glob("*.json")))
torn = [str(path) for path in disk.rglob("*.partial")]
visible = (disk / "store.zarr").exists()
subprocess.run(["mount", "-o", "remount,size=30m", disk], check=True)
begun = []
write(disk, described, given=lambda *given: begun.append(1) or __import__("small_store").values(*given))
sums = (disk / "store.zarr/SHA256SUMS").read_text()
print(json.dumps({"said": said, "done": done, "torn": torn, "visible": visible, "again": len(begun), "sums": sums}))
"""


def test_a_writer_goes_on_after_the_disk_was_full(tmp_path):
    described = layout(samples=600, shard=16)
    write(tmp_path / "unbroken", described)
    (tmp_path / "disk").mkdir()
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    here = Path(__file__).parent
    paths = {"PYTHONPATH": f"{here.parents[1]}:{here}"}
    command = [*namespace, sys.executable, "-c", SCRIPT, str(tmp_path / "disk")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | paths)
    assert ended.returncode == 0, ended.stderr
    seen = json.loads(ended.stdout)
    assert "No space left on device" in seen["said"]
    assert "/scratch/" in seen["said"]
    assert 2 <= seen["done"] < 38
    assert seen["again"] == 38 - seen["done"], "finished shards were written again"
    assert not seen["torn"]
    assert not seen["visible"]
    assert seen["sums"].encode() == content(tmp_path / "unbroken/store.zarr")["SHA256SUMS"]
