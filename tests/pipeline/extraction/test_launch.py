"""Several processes on one store, with one killed in the middle."""

import json
import os
import signal
import threading
import time
from dataclasses import replace

import psutil
import pytest

from cache.reader import FeatureStore
from cache.verify import verify
from pipeline.config import BackboneConfig, ComputeConfig, ExtractConfig
from pipeline.extraction import launch

EXTRACT = ExtractConfig(
    dtype="float16", codec="none", precision="float32", compiled=False, batch=0, shard=3, keep_levels=False,
    views=("identity",),
)  # fmt: skip


@pytest.fixture
def task(images_path, weights_folder, tmp_path):
    (weights_folder("csmask_b4") / "source.json").write_text(json.dumps({"weights": "pretrained"}))

    def make(name):
        return launch.ExtractionJob(
            "csmask_b4", BackboneConfig("efficientnet", "csmask_b4", "pretrained", 64), EXTRACT, "cpu",
            images_path=images_path("sample-landuse-seg"), weights_dir=weights_folder("csmask_b4"),
            scratch=tmp_path / name / "scratch", final=tmp_path / name / "store.zarr",
            n_threads=1,
        )  # fmt: skip

    return make


def bytes_of(store):
    return {path.relative_to(store): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def kill_one_at_work(shards) -> int:
    """Kill -9 a process that holds a shard, as soon as two shards are safe; returns the shard's number."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        time.sleep(0.05)
        if len(list(shards().glob("*.json"))) < 2:
            continue
        for child in psutil.Process().children(recursive=True):
            try:
                held = [
                    file.path
                    for file in child.open_files()
                    if file.path.endswith(".lock") and "/shards/" in file.path
                ]
            except psutil.Error:
                continue
            for lock in held:
                if not os.path.exists(lock.replace(".lock", ".json")):
                    os.kill(child.pid, signal.SIGKILL)
                    return int(os.path.basename(lock).removesuffix(".lock"))
    raise AssertionError("no worker was seen at work")


def test_two_workers_one_killed_make_the_store_of_one_process(task):
    alone = launch.launch(task("alone"), ComputeConfig("cpu", workers=0, scheduler=""))
    shared, together = task("shared"), {}
    thread = threading.Thread(target=lambda: together.update(launch.launch(shared, ComputeConfig("cpu", 2, ""))))
    thread.start()
    killed = kill_one_at_work(lambda: next(shared.scratch.glob("*/shards"), shared.scratch))
    thread.join(timeout=240)
    assert not thread.is_alive()
    assert killed in range(24)
    assert together == alone
    assert alone["batch"] == FeatureStore(shared.final).attributes["batch"] == 3  # four, but for the shard
    assert "whole" in verify(shared.final)
    assert bytes_of(shared.final) == bytes_of(task("alone").final)
    assert not list(shared.scratch.iterdir())
    assert len(FeatureStore(shared.final).sample) == 72


def test_a_store_in_lower_precision_is_whole_and_says_what_that_changed(task):
    lower = task("lower")
    said = launch.launch(
        replace(lower, extract=replace(EXTRACT, precision="bfloat16", shard=16)), ComputeConfig("cpu", 0, "")
    )
    assert "whole" in verify(lower.final)
    assert said["batch"] == FeatureStore(lower.final).attributes["batch"] == 4
    told = FeatureStore(lower.final).attributes["measurements"]["precision_error"]
    assert told == said["precision_error"]
    assert all(1e-4 < error < 0.3 for error in told.values())


@pytest.mark.slow
def test_the_workers_of_a_scheduler(task):
    from distributed import LocalCluster

    alone = launch.launch(task("alone"), ComputeConfig("cpu", workers=0, scheduler=""))
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        again = launch.launch(task("again"), ComputeConfig("cpu", workers=0, scheduler=cluster.scheduler_address))
    assert again == alone
