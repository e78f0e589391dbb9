"""Images stores: what they contain, what is refused, and writing by one process and by several."""

import dataclasses
import errno
import multiprocessing
import os
import shutil
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
from pipeline.data.image_store import ImageDataset, LazyImageDataset, Sample, open_images, parse_timestamp
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


def in_memory(task="classification", **changes) -> ImageDataset:
    samples, lazy = [read_sample(task, name) for name in NAMES], vars(lazy_dataset(task))
    arrays = {key: np.array([getattr(sample, key) for sample in samples])
              for key in ("image", "label", "lat", "lon", "time")}  # fmt: skip
    info = {field.name: lazy[field.name] for field in dataclasses.fields(ImageDataset) if field.name in lazy}
    return ImageDataset(**info | arrays | changes)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Function that writes a dataset to tmp_path/store in chunks of 3 samples."""
    monkeypatch.setattr(image_writer, "CHUNK", 3)
    monkeypatch.setattr(image_writer, "MIN_CHUNKS_FOR_PROCESSES", 2)
    return lambda dataset, **options: image_writer.write(dataset, tmp_path / "scratch", tmp_path / "store", **options)


@pytest.mark.parametrize(("task", "workers"), [("classification", 1), ("segmentation", 2)])
def test_write_by_several_processes_or_from_memory_gives_the_same_store(tmp_path, write, task, workers):
    dataset, expected = lazy_dataset(task), in_memory(task)
    write(dataset, workers=workers)
    images = open_images(tmp_path / "store").load()
    for key in ("image", "label", "sample", "split", "lat", "lon", "time"):
        np.testing.assert_array_equal(images[key], getattr(expected, key))
    assert images.image.dims == ("sample", "band", "y", "x")
    assert images.label.dims == (("sample", "y", "x") if task == "segmentation" else ("sample",))
    assert {"sample", "split", "band", "band_name", "wavelength", "lat", "lon", "time"} == set(images.coords)
    assert (images.image.attrs["units"], images.attrs["task"], images.attrs["gsd"]) == ("uint8", task, None)
    assert (images.band.values.tolist(), np.isnan(images.wavelength).values.tolist()) == (["red", "height"], [0, 1])
    write(expected)
    assert open_images(tmp_path / "store").attrs == images.attrs


def test_content_digest_depends_on_pixels_and_units(tmp_path, write):
    digests, image = set(), in_memory().image.copy()
    image[0, 0, 0, 0] += 1
    for changes in ({}, {"image": image}, {"units": "dn"}):
        write(in_memory(**changes))
        digests.add(open_images(tmp_path / "store").attrs["content_sha256"])
    assert len(digests) == 3


def read_before_disk_is_full(name: str) -> Sample:
    """Let the disk be full from a sample on."""
    if name >= "s18":
        import zarr.storage._local  # in the process that writes

        def refuse(*args, **options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "chunk")

        zarr.storage._local._put = refuse
    return read_sample("classification", name)


def kill_worker(name: str) -> Sample:
    """Kill the process if it is not the first one."""
    if multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGKILL)
    return read_sample("classification", name)


@pytest.mark.parametrize(
    ("changes", "error", "fields"),
    [
        ({"sample": [*NAMES[:-1], "s90"]}, UserError, {"path": "s90.tif"}),
        ({"read_sample": read_before_disk_is_full}, OSError, {"errno": errno.ENOSPC}),
        ({"read_sample": kill_worker}, UserError, {"key": "workers", "value": 2}),
    ],
    ids=["damaged sample", "full disk", "killed worker"],
)
def test_write_failure_in_a_process_is_raised_and_leaves_nothing(tmp_path, write, changes, error, fields):
    with raises(error, **fields):
        write(lazy_dataset(**changes), workers=2)
    assert list(tmp_path.iterdir()) == []


def test_write_uses_at_most_max_processes_and_chunk_bytes(tmp_path, write, monkeypatch):
    monkeypatch.setattr(image_writer, "MAX_PROCESSES", 1)
    monkeypatch.setattr(image_writer, "CHUNK_BYTES", 2 * 128)
    write(lazy_dataset(read_sample=kill_worker), workers=300)
    assert open_images(tmp_path / "store").image.encoding["chunks"] == (2, 2, 8, 8)


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
    keys: dict = {"env": {**os.environ, "PYTHONPATH": os.getcwd()}, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "script.py"], cwd=folder, **keys)


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


def read_nan(name: str) -> Sample:
    sample = read_sample("classification", name)
    image = sample.image.astype(np.float32)
    image[0, 0, 0] = np.nan if name == "s05" else 0
    return dataclasses.replace(sample, image=image)


@pytest.mark.parametrize(
    ("dataset", "fields"),
    [
        (lazy_dataset(shape=(2, 8, 9)), {"key": "image", "value": (2, 8, 8), "allowed": [(2, 8, 9)]}),
        (lazy_dataset(dtype=np.dtype("bool")), {"key": "image", "value": "uint8", "allowed": ["bool"]}),
        (lazy_dataset(read_sample=read_nan, dtype=np.dtype("f4")), {"key": "image", "value": "s05"}),
        (in_memory(task="segmentation", label=np.zeros(20)), {"key": "label", "value": (), "allowed": [(8, 8)]}),
        (lazy_dataset(classes=("x", "y")), {"key": "label", "allowed": ("x", "y")}),
        (lazy_dataset(split=["train", "val", "test", "unlabelled"] * 5), {"key": "split", "value": "unlabelled"}),
        (lazy_dataset(split=["train"] * 20), {"key": "split", "value": ["test", "val"]}),
        (lazy_dataset(sample=["s01", *NAMES[1:]]), {"key": "sample", "value": "s01"}),
        (lazy_dataset(bands=(Band("a", "red"), Band("b", "red"))), {"key": "bands", "value": "red"}),
        (lazy_dataset(units="photons"), {"key": "units", "value": "photons"}),
        (lazy_dataset(crs=["x"] * 19), {"key": "crs", "value": 19, "allowed": [20]}),
        (in_memory(label=np.zeros(19)), {"key": "label", "value": 19, "allowed": [20]}),
        (in_memory(bands=(Band("a", "red"),)), {"key": "image", "value": (20, 2, 8, 8), "allowed": [1]}),
        (in_memory(lat=np.full(20, 91)), {"key": "lat, lon"}),
    ],
)
def test_write_invalid_dataset_is_refused_and_writes_nothing(tmp_path, write, dataset, fields):
    with raises(UserError, **fields):
        write(dataset, workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["image/c.1.0.0.0", "label/c.1.0.0"])
def test_open_images_missing_store_or_missing_or_truncated_file_is_refused(tmp_path, write, name):
    write(lazy_dataset("segmentation"), workers=1)  # zarr would read zeros where a file is missing
    file = tmp_path / "store" / name
    size = file.stat().st_size
    os.truncate(file, 10)
    with raises(UserError, "dvc repro prepare@store", value=10, allowed=[size], path=file):
        open_images(tmp_path / "store")
    file.unlink()
    with raises(UserError, value=None, path=file):
        open_images(tmp_path / "store")
    with raises(UserError, "dvc repro prepare@m-eurosat", path=tmp_path / "m-eurosat.zarr"):
        open_images(tmp_path / "m-eurosat.zarr")


@pytest.mark.parametrize("name", ["sample", "split", "band", "label", "lat", "lon", "time", "wavelength"])
def test_open_images_missing_file_of_a_small_array_is_refused(tmp_path, write, name):
    write(in_memory())  # without the refusal, all labels would be the first class, and all locations 0° N, 0° E
    store = tmp_path / "store"
    for remove in ((store / name / "c/0").unlink, partial(shutil.rmtree, store / name)):
        remove()
        with raises(UserError, "dvc repro prepare@store", key=name, path=store / name / "c/0"):
            open_images(store)


def test_open_images_array_of_zeros_has_its_file(tmp_path, write):
    """zarr omits files of zeros by default; a missing file would then look the same."""
    zeros = np.zeros(20, int)
    write(in_memory(image=np.zeros((20, 2, 8, 8), np.uint8), label=zeros, lat=zeros, lon=zeros))
    images = open_images(tmp_path / "store")
    assert not any(images[name].values.any() for name in ("image", "label", "lat"))


def test_parse_timestamp_accepts_utc():
    for text in ("2017-02-16T10:21:01Z", "2017-02-16 10:21:01+00:00", "2017-02-16T10:21:01"):
        assert parse_timestamp(text, "time") == np.datetime64("2017-02-16T10:21:01", "s")
    assert np.isnat(parse_timestamp("", "time"))


@pytest.mark.parametrize("text", ["20170216", "today", "1487240461", "2017-02-16T10:21+01:00", "0001-01-01"])
def test_parse_timestamp_other_formats_are_refused(text):
    """numpy would read some of them as other times."""
    with raises(UserError, key="options.time", value=text):
        parse_timestamp(text, "options.time")
