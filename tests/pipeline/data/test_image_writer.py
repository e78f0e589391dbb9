"""Streams of samples become the same store whoever writes it."""

import dataclasses
import errno
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
from pipeline.data import image_writer, imagechunk
from pipeline.data.image_store import ImageDataset, LazyImageDataset, Sample
from pipeline.errors import UserError

NAMES = [f"s{number:02d}" for number in range(20)]


def read(task: str, name: str, out=None) -> Sample:
    number = int(name[1:])
    if number >= 90:
        raise UserError(f"{name}.tif is damaged")
    image = np.random.default_rng(number).integers(0, 200, (2, 8, 8)).astype(np.uint8)
    label = {"classification": np.int64(number % 3), "segmentation": image[0] % 3}[task]
    return Sample(image, label, lat=number / 10, lon=-number / 10, time=np.datetime64("2020-01-01", "s") + number)


def stream(task="classification", **changes) -> LazyImageDataset:
    described = {
        "sample": NAMES, "split": (["train"] * 2 + ["val", "test"]) * 5,
        "bands": (Band("a", "red", 0.66, 1), Band("h", "height")), "classes": ("x", "y", "z"), "task": task,
        "units": "uint8", "gsd": float("nan"), "licence": "none", "source": "made up",
        "read": partial(read, task), "shape": (2, 8, 8), "dtype": np.dtype("uint8"),
    }  # fmt: skip
    return LazyImageDataset(**described | changes)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_other_processes_write_the_same_store(tmp_path, monkeypatch, task):
    monkeypatch.setattr(image_writer, "CHUNK", 3)
    monkeypatch.setattr(image_writer, "_FEW", 2)
    digests = []
    for workers in (1, 2) if task == "segmentation" else (1,):
        image_writer.write(stream(task), tmp_path / "scratch", tmp_path / f"by-{workers}", workers=workers)
        opened = xr.open_zarr(tmp_path / f"by-{workers}")
        digests.append(opened.attrs["content_sha256"])
        for number, name in enumerate(NAMES):
            one = read(task, name)
            np.testing.assert_array_equal(opened.image[number], one.image)
            np.testing.assert_array_equal(opened.label[number], one.label)
        assert opened.lat[3] == 0.3
        assert opened.time[3].values == np.datetime64("2020-01-01T00:00:03")
        assert opened.attrs["gsd"] is None
        assert np.isnan(opened.wavelength[1])
    assert len(set(digests)) == 1
    # The same in memory is the same store.
    samples = [read(task, name) for name in NAMES]
    described = {field.name: getattr(stream(task), field.name) for field in dataclasses.fields(ImageDataset)
                 if hasattr(stream(task), field.name)}  # fmt: skip
    held = ImageDataset(
        **described,
        image=np.stack([one.image for one in samples]), label=np.stack([one.label for one in samples]),
        **{key: np.array([getattr(one, key) for one in samples]) for key in ("lat", "lon", "time")},
    )  # fmt: skip
    image_writer.write(held, tmp_path / "scratch", tmp_path / "held")
    assert xr.open_zarr(tmp_path / "held").attrs["content_sha256"] == digests[0]


def test_a_damaged_sample_in_another_process_is_named_or_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(image_writer, "CHUNK", 2)
    monkeypatch.setattr(image_writer, "_FEW", 2)
    damaged = stream(sample=[*NAMES[:-1], "s90"])
    with pytest.raises(UserError, match="s90.tif is damaged"):
        image_writer.write(damaged, tmp_path / "scratch", tmp_path / "store", workers=2)
    assert list(tmp_path.iterdir()) == []
    written = image_writer.write(damaged, tmp_path / "scratch", tmp_path / "store", workers=1, skip_bad=True)
    assert written.skipped == {"s90": "s90.tif is damaged"}
    assert xr.open_zarr(tmp_path / "store").sizes["sample"] == 19


def fails_at(sample: str, store: Path, name: str, out=None) -> Sample:
    if name == sample:
        (store / f"image/c.{NAMES.index(name) // 2}.0.0.0").mkdir()
    return read("classification", name)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("sample", ["s00", "s18"], ids=["the first chunk", "the last"])
def test_a_file_that_cannot_be_written_is_an_error(tmp_path, monkeypatch, workers, sample):
    """Files are written while the next chunk is read: what goes wrong then must be told all the same."""
    monkeypatch.setattr(image_writer, "CHUNK", 2)
    monkeypatch.setattr(image_writer, "_FEW", 2)
    fails = partial(fails_at, sample, tmp_path / "scratch")
    with pytest.raises(IsADirectoryError, match="image/c"):
        image_writer.write(stream(read=fails), tmp_path / "scratch", tmp_path / "store", workers=workers)
    assert list(tmp_path.iterdir()) == []


def killed_in_another_process(name: str, out=None) -> Sample:
    if multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGKILL)
    return read("classification", name)


def test_a_process_that_is_killed_ends_it_with_words(tmp_path, monkeypatch):
    monkeypatch.setattr(image_writer, "CHUNK", 2)
    monkeypatch.setattr(image_writer, "_FEW", 2)
    with pytest.raises(UserError, match="A process that read images was killed"):
        image_writer.write(
            stream(read=killed_in_another_process), tmp_path / "scratch", tmp_path / "store", workers=2
        )
    assert list(tmp_path.iterdir()) == []


def test_there_is_a_most_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(image_writer, "CHUNK", 2)
    monkeypatch.setattr(image_writer, "_FEW", 2)
    monkeypatch.setattr(image_writer, "_MOST", 1)
    image_writer.write(stream(read=killed_in_another_process), tmp_path / "scratch", tmp_path / "store", workers=300)
    assert xr.open_zarr(tmp_path / "store").sizes["sample"] == 20


# Each process that is started runs a script's own lines before it is told what to do.
SCRIPT = """
import multiprocessing, os, signal
from pathlib import Path

if multiprocessing.parent_process():
    os.kill(os.getpid(), signal.SIGKILL)

from pipeline.data import imagestore
from tests.pipeline.data.test_image_writer import stream

names = [f"s{number % 50:0{number // 50 + 2}d}" for number in range(4000)]  # more bytes than a pipe holds
many = stream(sample=names, split=["train", "val", "test", "test"] * 1000)
imagestore.write(many, Path("scratch"), Path("store"), workers=2)
"""


def test_a_process_that_dies_before_it_begins_is_not_waited_for(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    here = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=here, capture_output=True, text=True, timeout=60
    )
    assert "UserError: A process that read images was killed" in done.stderr
    assert [one.name for one in tmp_path.iterdir()] == ["script.py"]


SLOW = """
import os, time
from pathlib import Path
from pipeline.data import imagestore
from tests.pipeline.imagery import test_imagestore as tests

def slow(name, out=None):
    (Path("by") / str(os.getpid())).touch()
    time.sleep(0.05)
    return tests.read("classification", name)

if __name__ == "__main__":
    Path("by").mkdir()
    imagestore.CHUNK, imagestore._FEW = 1, 2
    imagestore.write(tests.stream(read=slow, sample=[f"s{0:0{n}d}" for n in range(2, 402)],
                                  split=["train", "val", "test", "test"] * 100), Path("scratch"), Path("store"), 2)
"""


def test_processes_end_with_the_one_that_started_them(tmp_path):
    (tmp_path / "script.py").write_text(SLOW)
    here = {**os.environ, "PYTHONPATH": os.getcwd()}
    before = set(Path("/dev/shm").glob("psm_*"))
    with subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, env=here, stderr=subprocess.DEVNULL) as run:
        assert (by := waited(lambda: {int(one.name) for one in (tmp_path / "by").glob("*")}, 2))
        run.kill()
    assert waited(lambda: [one for one in by if not alive(one)], 2)
    assert waited(lambda: [] if set(Path("/dev/shm").glob("psm_*")) - before else [True], 1)


def waited(found, many: int):
    """What was found, once it is so many things, within half a minute."""
    for _ in range(300):
        if len(now := found()) >= many:
            return now
        time.sleep(0.1)
    return None


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_sample_is_fetched_before_it_is_read_and_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(image_writer, "CHUNK", 7)
    monkeypatch.setattr(imagechunk, "_AHEAD", 3)
    asked, waiting = [], []

    def noted(name, out=None):
        assert name in asked
        waiting.append(len(set(asked)) - NAMES.index(name))
        return read("classification", name)

    image_writer.write(stream(read=noted, ahead=asked.extend), tmp_path / "scratch", tmp_path / "store", workers=1)
    assert set(asked) == set(NAMES)
    assert max(waiting) == 4, "this one and three more"


def test_a_chunk_has_a_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(image_writer, "CHUNK_BYTES", 5 * 128)
    image_writer.write(stream(), tmp_path / "scratch", tmp_path / "store", workers=1)
    assert xr.open_zarr(tmp_path / "store").image.encoding["chunks"] == (5, 2, 8, 8)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"shape": (2, 8, 9)}, r"Sample s00 has the shape \(2, 8, 8\)"),
        ({"dtype": np.dtype("bool")}, "do not fit into bool"),
        ({"classes": ("x", "y")}, "Sample s02: A label lies outside the 2 classes"),
        ({"sample": ["s01", *NAMES[1:]]}, "name appears twice"),
        ({"bands": (Band("a", "red"), Band("b", "red"))}, "Two bands are called 'red'"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(tmp_path, given, words):
    with pytest.raises(UserError, match=words):
        image_writer.write(stream(**given), tmp_path / "scratch", tmp_path / "store", workers=1)
    assert list(tmp_path.iterdir()) == []


def refused(*_):
    raise OSError(errno.EINVAL, "this disk cannot be written past the cache")


@pytest.mark.parametrize("start", [0, 8], ids=["at a block", "off a block"])
@pytest.mark.parametrize("size", [100, 3 * 4096, 3 * 4096 + 100])
@pytest.mark.parametrize("how", ["as it can", "refused", "a little at a time"])
def test_bytes_are_whole_however_the_disk_takes_them(tmp_path, monkeypatch, start, size, how):
    if how == "refused":
        flags = imagechunk.fcntl.fcntl
        monkeypatch.setattr(imagechunk.fcntl, "fcntl", lambda *given: refused() if given[-1] else flags(*given))
    memory = next(imagechunk._in_turn((16384,), np.dtype("uint8")))
    assert memory.ctypes.data % 4096 == 0
    memory[:] = np.random.default_rng(0).integers(0, 256, len(memory))
    kind = Little if how == "a little at a time" else io.FileIO
    with kind(tmp_path / "file", "wb") as file:
        imagechunk._fill(file, memoryview(memory)[start : start + size])
    assert (tmp_path / "file").read_bytes() == memory[start : start + size].tobytes()


class Little(io.FileIO):
    """A file that takes few bytes at once, and no whole blocks."""

    def write(self, data):
        return super().write(data[:5000])


def test_a_full_disk_is_an_error():
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        imagechunk._fill(file, memoryview(bytes(8192)))
