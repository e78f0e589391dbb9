"""Writing of images stores by one process and by several."""

import dataclasses
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline.bands import Band
from pipeline.data import image_writer
from pipeline.data.image_store import ImageDataset, LazyImageDataset, Sample, open_images
from pipeline.errors import UserError
from tests.errors import raises

NAMES = [f"s{number:02d}" for number in range(20)]


def read_sample(task: str, name: str) -> Sample:
    """Sample of a name such as s07; names from s90 on are damaged."""
    number = int(name[1:])
    if number >= 90:
        raise UserError(f"{name}.tif is damaged", path=f"{name}.tif")
    image = np.random.default_rng(number).integers(0, 200, (2, 8, 8)).astype(np.uint8)
    label = {"classification": np.int64(number % 3), "segmentation": image[0] % 3}[task]
    return Sample(image, label, lat=number / 10, lon=-number / 10, time=np.datetime64("2020-01-01", "s") + number)


def lazy_dataset(task="classification", **changes) -> LazyImageDataset:
    fields = {
        "sample": NAMES, "split": (["train"] * 2 + ["val", "test"]) * 5,
        "bands": (Band("a", "red", 0.66, 1), Band("h", "height")), "classes": ("x", "y", "z"), "task": task,
        "units": "uint8", "gsd": float("nan"), "licence": "none", "source": "test",
        "read_sample": partial(read_sample, task), "shape": (2, 8, 8), "dtype": np.dtype("uint8"),
    }  # fmt: skip
    return LazyImageDataset(**fields | changes)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Function that writes a dataset to tmp_path/store in chunks of 3 samples."""
    monkeypatch.setattr(image_writer, "CHUNK", 3)
    monkeypatch.setattr(image_writer, "MIN_CHUNKS_FOR_PROCESSES", 2)
    return lambda dataset, **options: image_writer.write(dataset, tmp_path / "scratch", tmp_path / "store", **options)


@pytest.mark.parametrize(("task", "workers"), [("classification", 1), ("segmentation", 2)])
def test_write_by_several_processes_or_from_memory_gives_the_same_store(tmp_path, write, task, workers):
    dataset = lazy_dataset(task)
    write(dataset, workers=workers)
    images = open_images(tmp_path / "store").load()
    samples = [read_sample(task, name) for name in NAMES]
    arrays = {key: np.array([getattr(sample, key) for sample in samples])
              for key in ("image", "label", "lat", "lon", "time")}  # fmt: skip
    for key, values in arrays.items():
        np.testing.assert_array_equal(images[key], values)
    assert images.attrs["gsd"] is None
    assert np.isnan(images.wavelength[1])
    info = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(ImageDataset)
            if hasattr(dataset, field.name)}  # fmt: skip
    write(ImageDataset(**info, **arrays))
    assert open_images(tmp_path / "store").attrs == images.attrs


def test_write_damaged_sample_is_refused_or_skipped(tmp_path, write):
    damaged = lazy_dataset(sample=[*NAMES[:-1], "s90"])
    with raises(UserError, path="s90.tif"):
        write(damaged, workers=2)
    assert list(tmp_path.iterdir()) == []
    summary = write(damaged, workers=1, skip_bad=True)
    assert summary.skipped == {"s90": "s90.tif is damaged"}
    assert sum(summary.counts.values()) == 19
    assert open_images(tmp_path / "store").sizes["sample"] == 19


def read_before_disk_is_full(full_from: str, name: str) -> Sample:
    """Let the disk be full from a sample on."""
    if name >= full_from:
        import zarr.storage._local  # in the process that writes

        def refuse(*args, **options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "chunk")

        zarr.storage._local._put = refuse
    return read_sample("classification", name)


def test_write_by_processes_on_a_full_disk_raises_and_leaves_nothing(tmp_path, write):
    with raises(OSError, errno=errno.ENOSPC):
        write(lazy_dataset(read_sample=partial(read_before_disk_is_full, "s18")), workers=2)
    assert list(tmp_path.iterdir()) == []


def kill_worker(name: str) -> Sample:
    """Kill the process if it is not the first one."""
    if multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGKILL)
    return read_sample("classification", name)


def test_write_killed_worker_raises_and_writes_nothing(tmp_path, write):
    with raises(UserError, key="workers", value=2):
        write(lazy_dataset(read_sample=kill_worker), workers=2)
    assert list(tmp_path.iterdir()) == []


def test_write_uses_at_most_max_processes(tmp_path, write, monkeypatch):
    monkeypatch.setattr(image_writer, "MAX_PROCESSES", 1)
    write(lazy_dataset(read_sample=kill_worker), workers=300)
    assert open_images(tmp_path / "store").sizes["sample"] == 20


# Each spawned process runs the script's own lines before it does any work.
KILL_AT_START = """
import multiprocessing, os, signal
from pathlib import Path

if multiprocessing.parent_process():
    os.kill(os.getpid(), signal.SIGKILL)

from pipeline.data import image_writer
from tests.pipeline.data.test_image_writer import lazy_dataset

names = [f"s{number % 50:0{number // 50 + 2}d}" for number in range(4000)]  # more bytes than a pipe holds
dataset = lazy_dataset(sample=names, split=["train", "val", "test", "test"] * 1000)
image_writer.write(dataset, Path("scratch"), Path("store"), workers=2)
"""
SLOW_SAMPLES = """
import os, time
from pathlib import Path
from pipeline.data import image_writer
from tests.pipeline.data import test_image_writer as tests

def read_slowly(name):
    (Path("processes") / str(os.getpid())).touch()
    time.sleep(0.05)
    return tests.read_sample("classification", name)

if __name__ == "__main__":
    Path("processes").mkdir()
    image_writer.CHUNK, image_writer.MIN_CHUNKS_FOR_PROCESSES = 1, 2
    dataset = tests.lazy_dataset(read_sample=read_slowly, sample=[f"s{0:0{n}d}" for n in range(2, 402)],
                                 split=["train", "val", "test", "test"] * 100)
    image_writer.write(dataset, Path("scratch"), Path("store"), 2)
"""


def start_script(folder: Path, text: str) -> subprocess.Popen:
    (folder / "script.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        [sys.executable, "script.py"], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )


def test_write_worker_that_dies_before_it_starts_raises(tmp_path):
    with start_script(tmp_path, KILL_AT_START) as process:
        assert "pipeline.errors.UserError: " in process.communicate(timeout=60)[1]
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_write_workers_exit_when_the_parent_is_killed(tmp_path):
    def is_alive(process: int) -> bool:
        stat = Path(f"/proc/{process}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    with start_script(tmp_path, SLOW_SAMPLES) as parent:
        processes = wait_until(lambda: {int(path.name) for path in (tmp_path / "processes").glob("*")}, 2)
        assert processes
        parent.kill()
        assert wait_until(lambda: [process for process in processes if not is_alive(process)], 2)


def wait_until(find, count: int):
    """Return what `find` returns once it has `count` elements; None after half a minute."""
    for _ in range(300):
        if len(result := find()) >= count:
            return result
        time.sleep(0.1)
    return None


def test_write_chunk_has_at_most_chunk_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(image_writer, "CHUNK_BYTES", 5 * 128)
    image_writer.write(lazy_dataset(), tmp_path / "scratch", tmp_path / "store", workers=1)
    assert open_images(tmp_path / "store").image.encoding["chunks"] == (5, 2, 8, 8)


def read_nan(name: str) -> Sample:
    sample = read_sample("classification", name)
    image = sample.image.astype(np.float32)
    image[0, 0, 0] = np.nan if name == "s05" else 0
    return dataclasses.replace(sample, image=image)


@pytest.mark.parametrize(
    ("changes", "mentions", "fields"),
    [
        ({"shape": (2, 8, 9)}, ["s00"], {"key": "image", "value": (2, 8, 8), "allowed": [(2, 8, 9)]}),
        ({"dtype": np.dtype("bool")}, ["s00"], {"key": "image", "value": "uint8", "allowed": ["bool"]}),
        ({"read_sample": read_nan, "dtype": np.dtype("f4")}, [], {"key": "image", "value": "s05"}),
        (
            {"task": "segmentation", "read_sample": partial(read_sample, "classification")},
            ["s00"],
            {"key": "label", "value": (), "allowed": [(8, 8)]},
        ),
        ({"classes": ("x", "y")}, ["s02"], {"key": "label", "allowed": ("x", "y")}),
        ({"split": ["train", "val", "test", "unlabelled"] * 5}, ["s03"], {"key": "split", "value": "unlabelled"}),
        ({"sample": ["s01", *NAMES[1:]]}, [], {"key": "sample", "value": "s01"}),
        ({"bands": (Band("a", "red"), Band("b", "red"))}, [], {"key": "bands", "value": "red"}),
    ],
)
def test_write_invalid_dataset_is_refused_and_writes_nothing(tmp_path, write, changes, mentions, fields):
    with raises(UserError, *mentions, **fields):
        write(lazy_dataset(**changes), workers=1)
    assert list(tmp_path.iterdir()) == []
