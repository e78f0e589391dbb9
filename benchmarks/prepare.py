"""Preparing GEO-Bench against plain h5py reading the same files: python -m benchmarks.prepare

Theirs reads every array of a file, on one core, and nothing else. `read` is our reader: the same arrays, and the
pickles, without running them. `prepare` also checks, hashes, writes and flushes the images store: on one core, and on
all, by a process on each. `copy` is theirs, which also writes and flushes what it read (masks as bytes; of
m-chesapeake-landcover four times as many bytes as the store has), and neither checks nor hashes. Ratios are samples a
second of each core used, over theirs, medians over alternating rounds: `cold`, with files that come from the disk, as
those of a set that is prepared once, and `warm`, with files that the system holds in memory. `processor` has the same
ratios by seconds of processor time, which other programs change less; waiting for a disk is not in them. Each way has
a process of its own, timed from when that has imported what it needs: in one process, what a way leaves in the C
library's heap makes the next faster. Cores share their memory's pace: `h5py_all_cores` is theirs by a process on each
core, each of which reads its part of the files.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from benchmarks.timing import seconds
from pipeline.config import DatasetConfig
from pipeline.data import image_writer
from pipeline.data.sources import geobench

ROUNDS = 3
SETS = {"m-eurosat": 2000, "m-bigearthnet": 1600, "m-chesapeake-landcover": 5000}


def main() -> None:
    """Print the ratios as JSON."""
    from tests import geobench_files  # here, since the processes that it starts would import it too

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, help="where files are written; a fast disk, by default a temporary one"
    )
    given = parser.parse_args()
    found = {"cores": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        root = Path(folder)
        scene, photo, mask = _pixels()
        for name, samples in SETS.items():
            counts = (samples - samples // 2, samples // 4, samples // 4)
            files = geobench_files.write(name, root, scene, photo, mask, counts)
            size = sum(path.stat().st_size for path in files.glob("*.hdf5"))
            found[name] = {"megabytes": size >> 20} | {
                state: _ratios(root, name, files, samples, state == "cold") for state in ("warm", "cold")
            }
            shutil.rmtree(files)
            print(name, found[name], file=sys.stderr)
        found["rss_growth"] = _growth(root, scene, photo, mask)
    print(json.dumps(found))


def _ratios(root: Path, name: str, files: Path, samples: int, cold: bool) -> dict:
    cores = os.sched_getaffinity(0)
    one = {min(cores)}
    every = sorted(files.glob("*.hdf5"))
    pool = ProcessPoolExecutor(len(cores), multiprocessing.get_context("spawn"))
    ways = {
        "h5py": (one, partial(_plain, every)),
        "h5py_all_cores": (cores, partial(_shared, pool, every, len(cores))),
        "copy": (one, partial(_copy, files, root / "copy")),
        "read": (one, partial(_read, root, name)),
        "prepare": (one, partial(_prepare, root, name, 1)),
        "prepare_all_cores": (cores, partial(_prepare, root, name, len(cores))),
    }
    # The pool's processes do not end, and so their processor time is not counted.
    paces, processor = {way: [] for way in ways}, {way: [] for way in ways if way != "h5py_all_cores"}
    _shared(pool, every[: 4 * len(cores)], len(cores))  # its processes have imported what they need
    for _ in range(ROUNDS):
        for way, (used, work) in ways.items():
            _settle(files, cold)
            if way in processor:
                wall, busy = _alone(work, used)
                processor[way].append(samples / busy)
            else:
                wall = seconds(work)
            paces[way].append(samples / wall / len(used))
            shutil.rmtree(root / "store.zarr", ignore_errors=True)
            (root / "copy").unlink(missing_ok=True)
    pool.shutdown()
    found = {way: statistics.median(one) for way, one in paces.items()}
    like = {"prepare_all_cores_vs_h5py_all_cores": round(found["prepare_all_cores"] / found["h5py_all_cores"], 3)}
    return _over(paces) | like | {"processor": _over(processor), "h5py_samples_per_second": round(found["h5py"])}


def _over(paces: dict[str, list[float]]) -> dict[str, float]:
    theirs = statistics.median(paces["h5py"])
    return {
        f"{way}_vs_h5py": round(statistics.median(one) / theirs, 3) for way, one in paces.items() if way != "h5py"
    }


def _shared(pool: ProcessPoolExecutor, paths: list[Path], parts: int) -> None:
    list(pool.map(_plain, [paths[part::parts] for part in range(parts)]))


def _processor() -> float:
    """Seconds of processor time of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def _settle(files: Path, cold: bool) -> None:
    """Nothing is left to be written, and the files are all in memory, or none is."""
    os.sync()
    for path in files.glob("*.hdf5"):
        if not cold:
            path.read_bytes()
            continue
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _alone(work: Callable[[], None], cores: set[int]) -> tuple[float, float]:
    """Seconds, and seconds of processor time, that work takes in a new process that keeps to these cores."""
    every = os.sched_getaffinity(0)
    context = multiprocessing.get_context("spawn")
    os.sched_setaffinity(0, cores)  # the process, and those that it starts, inherit it
    try:
        with ProcessPoolExecutor(1, context) as process:
            return process.submit(_timed, work).result()
    finally:
        os.sched_setaffinity(0, every)


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    for name in ("tqdm", "zarr"):  # here, since the processes that prepare starts would import them too
        importlib.import_module(name)
    begun = _processor()
    return seconds(work), _processor() - begun


def _pixels():
    """Pixels of the kinds that the sets hold; what they show does not matter here."""
    generator = np.random.default_rng(0)
    scene = generator.integers(0, 5000, (13, 768, 768)).astype(np.uint16)
    photo = generator.integers(0, 255, (3, 768, 768)).astype(np.uint8)
    return scene, photo, generator.integers(0, 7, (768, 768)).astype(np.uint8)


def _arrays(path: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    with h5py.File(path, "r") as file:
        image = np.stack([np.array(file[key]) for key in sorted(file) if key != "label"])
        return image, [np.array(file[key]) for key in file if key == "label"]


def _plain(paths: list[Path]) -> None:
    for path in paths:
        _arrays(path)


def _copy(files: Path, copy: Path) -> None:
    with open(copy, "wb", buffering=0) as file:
        for path in sorted(files.glob("*.hdf5")):
            image, masks = _arrays(path)
            file.write(image)
            for mask in masks:
                file.write(mask.astype(np.uint8))
        os.fsync(file.fileno())


def _stream(root: Path, name: str):
    (root / "source.json").write_text(json.dumps(geobench.describe_files(geobench.SETS[name], "default", root)))
    return geobench.prepare(root, DatasetConfig("geobench", options={"set": name}))


def _read(root: Path, name: str) -> None:
    stream = _stream(root, name)
    memory = np.empty(stream.shape, stream.dtype)
    for sample in stream.sample:
        stream.read_sample(sample, memory)


def _prepare(root: Path, name: str, workers: int) -> None:
    image_writer.write(_stream(root, name), root / "scratch", root / "store.zarr", workers)


_ALONE = """
import sys
from pathlib import Path
from benchmarks.prepare import _prepare

_prepare(Path(sys.argv[1]), "m-bigearthnet", 1)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(status["VmHWM"].split()[0])
"""


def _growth(root: Path, scene, photo, mask) -> float:
    """Peak memory of a process that prepares four times as many samples, over one that prepares some."""
    from tests import geobench_files

    peaks = []
    for samples in (400, 1600):
        shutil.rmtree(root / "classification_v1.0", ignore_errors=True)
        geobench_files.write("m-bigearthnet", root, scene, photo, mask, (samples - 8, 4, 4))
        done = subprocess.run([sys.executable, "-c", _ALONE, root], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    return round(peaks[1] / peaks[0], 3)


if __name__ == "__main__":
    main()
