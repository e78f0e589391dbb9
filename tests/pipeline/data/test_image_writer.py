"""Writing of images stores by one process and by several."""

import dataclasses
import errno
import fcntl
import io
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
import xarray as xr

from pipeline.bands import Band
from pipeline.data import image_writer
from pipeline.data.image_store import ImageDataset, LazyImageDataset, Sample
from pipeline.errors import UserError
from tests.errors import raises

NAMES = [f"s{number:02d}" for number in range(20)]


def read_sample(task: str, name: str, out=None) -> Sample:
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
    """Function that writes a dataset to tmp_path/store in chunks of 2 samples."""
    monkeypatch.setattr(image_writer, "CHUNK", 2)
    monkeypatch.setattr(image_writer, "MIN_CHUNKS_FOR_PROCESSES", 2)
    return lambda dataset, **options: image_writer.write(dataset, tmp_path / "scratch", tmp_path / "store", **options)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_write_by_several_processes_or_from_memory_gives_the_same_store(tmp_path, monkeypatch, task):
    monkeypatch.setattr(image_writer, "CHUNK", 3)
    monkeypatch.setattr(image_writer, "MIN_CHUNKS_FOR_PROCESSES", 2)
    dataset, digests = lazy_dataset(task), []
    for workers in (1, 2) if task == "segmentation" else (1,):
        path = tmp_path / f"workers-{workers}"
        image_writer.write(dataset, tmp_path / "scratch", path, workers=workers)
        images = xr.open_zarr(path)
        digests.append(images.attrs["content_sha256"])
        for number, name in enumerate(NAMES):
            sample = read_sample(task, name)
            np.testing.assert_array_equal(images.image[number], sample.image)
            np.testing.assert_array_equal(images.label[number], sample.label)
        assert images.lat[3] == 0.3
        assert images.time[3].values == np.datetime64("2020-01-01T00:00:03")
        assert images.attrs["gsd"] is None
        assert np.isnan(images.wavelength[1])
    assert len(set(digests)) == 1
    samples = [read_sample(task, name) for name in NAMES]
    fields = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(ImageDataset)
              if hasattr(dataset, field.name)}  # fmt: skip
    in_memory = ImageDataset(
        **fields,
        image=np.stack([sample.image for sample in samples]),
        label=np.stack([sample.label for sample in samples]),
        **{key: np.array([getattr(sample, key) for sample in samples]) for key in ("lat", "lon", "time")},
    )
    image_writer.write(in_memory, tmp_path / "scratch", tmp_path / "in-memory")
    assert xr.open_zarr(tmp_path / "in-memory").attrs["content_sha256"] == digests[0]


def test_write_damaged_sample_is_refused_or_skipped(tmp_path, write):
    damaged = lazy_dataset(sample=[*NAMES[:-1], "s90"])
    with raises(UserError, path="s90.tif"):
        write(damaged, workers=2)
    assert list(tmp_path.iterdir()) == []
    summary = write(damaged, workers=1, skip_bad=True)
    assert summary.skipped == {"s90": "s90.tif is damaged"}
    assert sum(summary.counts.values()) == 19
    assert xr.open_zarr(tmp_path / "store").sizes["sample"] == 19


def block_chunk_file(blocked: str, store: Path, name: str, out=None) -> Sample:
    """Create a folder at the path of a chunk's file, so that it cannot be written, and read a sample."""
    if name == blocked:
        (store / f"image/c.{NAMES.index(name) // 2}.0.0.0").mkdir()
    return read_sample("classification", name)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("sample", ["s00", "s18"], ids=["first chunk", "last chunk"])
def test_write_file_that_cannot_be_written_raises(tmp_path, write, workers, sample):
    """Files are written while the next chunk is read; their errors must not be lost."""
    dataset = lazy_dataset(read_sample=partial(block_chunk_file, sample, tmp_path / "scratch"))
    with pytest.raises(IsADirectoryError) as info:
        write(dataset, workers=workers)
    assert "image/c" in info.value.filename
    assert list(tmp_path.iterdir()) == []


def kill_worker(name: str, out=None) -> Sample:
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
    assert xr.open_zarr(tmp_path / "store").sizes["sample"] == 20


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


def test_write_worker_that_dies_before_it_starts_raises(tmp_path):
    (tmp_path / "script.py").write_text(KILL_AT_START)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 1
    assert "pipeline.errors.UserError: " in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


SLOW_SAMPLES = """
import os, time
from pathlib import Path
from pipeline.data import image_writer
from tests.pipeline.data import test_image_writer as tests

def read_slowly(name, out=None):
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


def test_write_workers_exit_when_the_parent_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(SLOW_SAMPLES)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    before = set(Path("/dev/shm").glob("psm_*"))
    with subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
    ) as parent:
        processes = wait_until(lambda: {int(path.name) for path in (tmp_path / "processes").glob("*")}, 2)
        assert processes
        parent.kill()
    assert wait_until(lambda: [process for process in processes if not is_alive(process)], 2)
    assert wait_until(lambda: [] if set(Path("/dev/shm").glob("psm_*")) - before else [True], 1)


def wait_until(find, count: int):
    """Return what `find` returns once it has `count` elements; None after half a minute."""
    for _ in range(300):
        if len(result := find()) >= count:
            return result
        time.sleep(0.1)
    return None


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_write_prefetches_every_sample_and_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(image_writer, "CHUNK", 7)
    monkeypatch.setattr(image_writer, "PREFETCH_SAMPLES", 3)
    prefetched, distances = [], []

    def read_prefetched(name, out=None):
        assert name in prefetched
        distances.append(len(set(prefetched)) - NAMES.index(name))
        return read_sample("classification", name)

    dataset = lazy_dataset(read_sample=read_prefetched, prefetch=prefetched.extend)
    image_writer.write(dataset, tmp_path / "scratch", tmp_path / "store", workers=1)
    assert set(prefetched) == set(NAMES)
    assert max(distances) == 4, "this sample and three more"


def test_write_chunk_has_at_most_chunk_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(image_writer, "CHUNK_BYTES", 5 * 128)
    image_writer.write(lazy_dataset(), tmp_path / "scratch", tmp_path / "store", workers=1)
    assert xr.open_zarr(tmp_path / "store").image.encoding["chunks"] == (5, 2, 8, 8)


@pytest.mark.parametrize(
    ("changes", "mentions", "fields"),
    [
        ({"shape": (2, 8, 9)}, ["s00"], {"key": "image", "value": (2, 8, 8), "allowed": [(2, 8, 9)]}),
        ({"dtype": np.dtype("bool")}, ["s00"], {"key": "image", "value": "uint8", "allowed": ["bool"]}),
        ({"classes": ("x", "y")}, ["s02"], {"key": "label", "allowed": ("x", "y")}),
        ({"sample": ["s01", *NAMES[1:]]}, [], {"key": "sample", "value": "s01"}),
        ({"bands": (Band("a", "red"), Band("b", "red"))}, [], {"key": "bands", "value": "red"}),
    ],
)
def test_write_invalid_dataset_is_refused_and_writes_nothing(tmp_path, changes, mentions, fields):
    with raises(UserError, *mentions, **fields):
        image_writer.write(lazy_dataset(**changes), tmp_path / "scratch", tmp_path / "store", workers=1)
    assert list(tmp_path.iterdir()) == []


def read_nan(name: str, out=None) -> Sample:
    sample = read_sample("classification", name)
    image = sample.image.astype(np.float32)
    image[0, 0, 0] = np.nan if name == "s05" else 0
    return dataclasses.replace(sample, image=image)


def test_write_non_finite_pixels_are_refused(tmp_path):
    dataset = lazy_dataset(read_sample=read_nan, dtype=np.dtype(np.float32))
    with raises(UserError, key="image", value="s05"):
        image_writer.write(dataset, tmp_path / "scratch", tmp_path / "store", workers=1)
    assert list(tmp_path.iterdir()) == []


def refuse_direct_writes(*_):
    raise OSError(errno.EINVAL, "this disk does not allow O_DIRECT")


class PartialWrites(io.FileIO):
    """A file that takes few bytes at once, and no whole disk blocks."""

    def write(self, data):
        return super().write(data[:5000])


@pytest.mark.parametrize("start", [0, 8], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("size", [100, 3 * 4096, 3 * 4096 + 100])
@pytest.mark.parametrize("how", ["direct", "without O_DIRECT", "partial writes"])
def test_write_uncached_writes_all_bytes(tmp_path, monkeypatch, start, size, how):
    if how == "without O_DIRECT":
        set_flags = fcntl.fcntl
        monkeypatch.setattr(
            image_writer.fcntl, "fcntl", lambda *args: refuse_direct_writes() if args[-1] else set_flags(*args)
        )
    memory = next(image_writer._alternating_buffers((16384,), np.dtype("uint8")))
    assert memory.ctypes.data % 4096 == 0
    memory[:] = np.random.default_rng(0).integers(0, 256, len(memory))
    file_type = PartialWrites if how == "partial writes" else io.FileIO
    with file_type(tmp_path / "file", "wb") as file:
        image_writer._write_uncached(file, memoryview(memory)[start : start + size])
    assert (tmp_path / "file").read_bytes() == memory[start : start + size].tobytes()


def test_write_uncached_on_a_full_disk_raises():
    with open("/dev/full", "wb", buffering=0) as file, raises(OSError, errno=errno.ENOSPC):
        image_writer._write_uncached(file, memoryview(bytes(8192)))
