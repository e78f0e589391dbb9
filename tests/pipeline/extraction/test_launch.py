"""Several processes on one store, one of which is killed."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from distributed import LocalCluster
from small_store import file_bytes

from cache.reader import FeatureStore
from cache.verify import verify
from pipeline.config import BackboneConfig, ComputeConfig, ExtractConfig
from pipeline.errors import UserError
from pipeline.extraction import launch
from tests.errors import raises

EXTRACT = ExtractConfig(
    dtype="float16", codec="none", precision="float32", compiled=False, batch=0, shard=3, keep_levels=False,
    views=("identity",),
)  # fmt: skip
CSMASK = BackboneConfig("efficientnet", "csmask_b4", "pretrained", 64)
LITE0 = BackboneConfig("efficientnet", "lite0", "random", 32)
THIS_PROCESS = ComputeConfig("cpu", workers=0, scheduler="")


@pytest.fixture
def make_job(images_path, weights_folder, tmp_path):
    """Function from a name to a job that writes into a folder of that name."""
    (weights_folder("csmask_b4") / "source.json").write_text(json.dumps({"weights": "pretrained"}))

    def make(name):
        return launch.ExtractionJob(
            "csmask_b4", CSMASK, EXTRACT, "cpu",
            images_path=images_path("sample-landuse-seg"), weights_dir=weights_folder("csmask_b4"),
            scratch=tmp_path / name / "scratch", final=tmp_path / name / "store.zarr",
            n_threads=1,
        )  # fmt: skip

    return make


def claimed_shards(process) -> list[int]:
    """Return the shards that a process has locked and not finished."""
    try:
        paths = [Path(file.path) for file in process.open_files()]
    except psutil.Error:
        return []
    locks = [path for path in paths if path.suffix == ".lock" and path.parent.name == "shards"]
    return [int(lock.stem) for lock in locks if not lock.with_suffix(".json").exists()]


def kill_a_working_process(find_shards_folder) -> int:
    """Kill -9 a process that has claimed a shard, once two shards are finished; return the shard's number."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        time.sleep(0.05)
        if len(list(find_shards_folder().glob("*.json"))) < 2:
            continue
        for child in psutil.Process().children(recursive=True):
            for shard in claimed_shards(child):
                os.kill(child.pid, signal.SIGKILL)
                return shard
    raise AssertionError("no process claimed a shard")


def test_launch_with_two_workers_one_killed_writes_the_bytes_of_one_process(make_job):
    single = launch.launch(make_job("single"), THIS_PROCESS)
    job, attributes = make_job("shared"), {}
    compute = ComputeConfig("cpu", workers=2, scheduler="")
    thread = threading.Thread(target=lambda: attributes.update(launch.launch(job, compute)))
    thread.start()
    killed = kill_a_working_process(lambda: next(job.scratch.glob("*/shards"), job.scratch))
    thread.join(timeout=240)
    assert not thread.is_alive()
    assert killed in range(24)
    assert attributes == single
    assert single["batch"] == FeatureStore(job.final).attributes["batch"] == 3  # four, limited by the shard
    verify(job.final)
    assert file_bytes(job.final) == file_bytes(make_job("single").final)
    assert not list(job.scratch.iterdir())
    assert len(FeatureStore(job.final).sample) == 72


def test_launch_in_bfloat16_stores_the_difference_to_float32(make_job):
    job = replace(make_job("lower"), extract=replace(EXTRACT, precision="bfloat16", shard=16), backbone=LITE0)
    attributes = launch.launch(job, THIS_PROCESS)
    verify(job.final)
    stored = FeatureStore(job.final).attributes
    assert attributes["batch"] == stored["batch"] == 4
    assert attributes["precision_error"] == stored["measurements"]["precision_error"]
    assert all(1e-4 < error < 0.3 for error in attributes["precision_error"].values())


def test_launch_on_a_scheduler_needs_a_certain_device(make_job):
    compute = ComputeConfig("auto", workers=0, scheduler="tcp://localhost:8786")
    with raises(UserError, key="compute.device", value="auto", allowed=("cuda", "cpu")):
        launch.launch(replace(make_job("auto"), device="auto"), compute)


@pytest.mark.slow
def test_launch_on_a_scheduler_writes_the_same_store(make_job):
    single = launch.launch(make_job("single"), THIS_PROCESS)
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        compute = ComputeConfig("cpu", workers=0, scheduler=cluster.scheduler_address)
        assert launch.launch(make_job("scheduler"), compute) == single
