"""Preparing GEO-Bench datasets, compared with plain h5py that reads the same files.

    python -m benchmarks.prepare

- `h5py` reads every array of a file, on one core, and does nothing else; `h5py_all_cores` has a process per core,
  each for a part of the files.
- `read`: our reader, which reads the same arrays, and the pickles without running them.
- `prepare`, `prepare_all_cores`: also checks, hashes, writes and flushes the images store, on one core or with a
  process per core.
- `copy`: h5py, and writes and flushes what it read (masks as bytes; for m-chesapeake-landcover four times as many
  bytes as the store has), without checks and hashes.

Ratios are samples per second and core, divided by those of `h5py`, medians over alternating rounds: `cold` with files
on the disk, as for a dataset that is prepared once, and `warm` with files in the page cache. `cpu_time` has the same
ratios by CPU time, which other programs change less, and which excludes waiting for the disk. Each case runs in a
separate process, timed after its imports: in one process, the heap that a case leaves in the C library makes the next
case faster.
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
N_SAMPLES = {"m-eurosat": 2000, "m-bigearthnet": 1600, "m-chesapeake-landcover": 5000}


def main() -> None:
    """Print the ratios as JSON."""
    # Imported here, because the processes of the benchmark import this module, too.
    from tests import geobench_files

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for the files, on a fast disk; by default a temporary folder")
    arguments = parser.parse_args()
    results = {"cores": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root = Path(folder)
        scene, photo, mask = _random_pixels()
        for name, n_samples in N_SAMPLES.items():
            counts = (n_samples - n_samples // 2, n_samples // 4, n_samples // 4)
            files = geobench_files.write(name, root, scene, photo, mask, counts)
            size = sum(path.stat().st_size for path in files.glob("*.hdf5"))
            results[name] = {"megabytes": size >> 20} | {
                state: _measure(root, name, files, n_samples, state == "cold") for state in ("warm", "cold")
            }
            shutil.rmtree(files)
            print(name, results[name], file=sys.stderr)
        results["rss_growth"] = _memory_growth(root, scene, photo, mask)
    print(json.dumps(results))


def _measure(root: Path, name: str, files: Path, n_samples: int, is_cold: bool) -> dict:
    """Measure all cases for one dataset."""
    cores = os.sched_getaffinity(0)
    one_core = {min(cores)}
    paths = sorted(files.glob("*.hdf5"))
    pool = ProcessPoolExecutor(len(cores), multiprocessing.get_context("spawn"))
    cases = {
        "h5py": (one_core, partial(_read_with_h5py, paths)),
        "h5py_all_cores": (cores, partial(_read_with_h5py_in_pool, pool, paths, len(cores))),
        "copy": (one_core, partial(_copy, files, root / "copy")),
        "read": (one_core, partial(_read, root, name)),
        "prepare": (one_core, partial(_prepare, root, name, 1)),
        "prepare_all_cores": (cores, partial(_prepare, root, name, len(cores))),
    }
    # CPU time covers only processes that have ended, and those of the pool have not.
    rates, cpu_rates = {case: [] for case in cases}, {case: [] for case in cases if case != "h5py_all_cores"}
    _read_with_h5py_in_pool(pool, paths[: 4 * len(cores)], len(cores))  # so that its processes import what they need
    for _ in range(ROUNDS):
        for case, (used_cores, work) in cases.items():
            _prepare_page_cache(files, is_cold)
            if case in cpu_rates:
                wall, cpu = _run_in_process(work, used_cores)
                cpu_rates[case].append(n_samples / cpu)
            else:
                wall = seconds(work)
            rates[case].append(n_samples / wall / len(used_cores))
            shutil.rmtree(root / "store.zarr", ignore_errors=True)
            (root / "copy").unlink(missing_ok=True)
    pool.shutdown()
    medians = {case: statistics.median(values) for case, values in rates.items()}
    return _ratios(rates) | {
        "prepare_all_cores_vs_h5py_all_cores": round(medians["prepare_all_cores"] / medians["h5py_all_cores"], 3),
        "cpu_time": _ratios(cpu_rates),
        "h5py_samples_per_second": round(medians["h5py"]),
    }


def _ratios(rates: dict[str, list[float]]) -> dict[str, float]:
    reference = statistics.median(rates["h5py"])
    return {
        f"{case}_vs_h5py": round(statistics.median(values) / reference, 3)
        for case, values in rates.items()
        if case != "h5py"
    }


def _prepare_page_cache(files: Path, is_cold: bool) -> None:
    """Flush all writes, and load all files into the page cache or drop them from it."""
    os.sync()
    for path in files.glob("*.hdf5"):
        if not is_cold:
            path.read_bytes()
            continue
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _run_in_process(work: Callable[[], None], cores: set[int]) -> tuple[float, float]:
    """Return wall time and CPU time, in seconds, of work in a new process on these cores."""
    all_cores = os.sched_getaffinity(0)
    context = multiprocessing.get_context("spawn")
    os.sched_setaffinity(0, cores)  # the process, and those that it starts, inherit it
    try:
        with ProcessPoolExecutor(1, context) as process:
            return process.submit(_time, work).result()
    finally:
        os.sched_setaffinity(0, all_cores)


def _time(work: Callable[[], None]) -> tuple[float, float]:
    for name in ("tqdm", "zarr"):  # imported here, because the processes that `prepare` starts import this module
        importlib.import_module(name)
    start = _cpu_seconds()
    return seconds(work), _cpu_seconds() - start


def _cpu_seconds() -> float:
    """CPU time of this process, and of its child processes that have ended."""
    return sum(os.times()[:4])


def _random_pixels() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random scene, photo and mask in the shapes and dtypes of the datasets."""
    generator = np.random.default_rng(0)
    scene = generator.integers(0, 5000, (13, 768, 768)).astype(np.uint16)
    photo = generator.integers(0, 255, (3, 768, 768)).astype(np.uint8)
    return scene, photo, generator.integers(0, 7, (768, 768)).astype(np.uint8)


def _read_file(path: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    with h5py.File(path, "r") as file:
        image = np.stack([np.array(file[key]) for key in sorted(file) if key != "label"])
        return image, [np.array(file[key]) for key in file if key == "label"]


def _read_with_h5py(paths: list[Path]) -> None:
    for path in paths:
        _read_file(path)


def _read_with_h5py_in_pool(pool: ProcessPoolExecutor, paths: list[Path], n_parts: int) -> None:
    list(pool.map(_read_with_h5py, [paths[part::n_parts] for part in range(n_parts)]))


def _copy(files: Path, copy: Path) -> None:
    with open(copy, "wb", buffering=0) as file:
        for path in sorted(files.glob("*.hdf5")):
            image, masks = _read_file(path)
            file.write(image)
            for mask in masks:
                file.write(mask.astype(np.uint8))
        os.fsync(file.fileno())


def _open(root: Path, name: str):
    (root / "source.json").write_text(json.dumps(geobench.describe_files(geobench.SETS[name], "default", root)))
    return geobench.prepare(root, DatasetConfig("geobench", options={"set": name}))


def _read(root: Path, name: str) -> None:
    dataset = _open(root, name)
    memory = np.empty(dataset.shape, dataset.dtype)
    for sample in dataset.sample:
        dataset.read_sample(sample, memory)


def _prepare(root: Path, name: str, workers: int) -> None:
    image_writer.write(_open(root, name), root / "scratch", root / "store.zarr", workers)


_PEAK_SCRIPT = """
import sys
from pathlib import Path
from benchmarks.prepare import _prepare

_prepare(Path(sys.argv[1]), "m-bigearthnet", 1)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(status["VmHWM"].split()[0])
"""


def _memory_growth(root: Path, scene: np.ndarray, photo: np.ndarray, mask: np.ndarray) -> float:
    """Peak memory of preparing 1600 samples, divided by that of preparing 400."""
    # Imported here, because the processes of the benchmark import this module, too.
    from tests import geobench_files

    peaks = []
    for n_samples in (400, 1600):
        shutil.rmtree(root / "classification_v1.0", ignore_errors=True)
        geobench_files.write("m-bigearthnet", root, scene, photo, mask, (n_samples - 8, 4, 4))
        command = [sys.executable, "-c", _PEAK_SCRIPT, root]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return round(peaks[1] / peaks[0], 3)


if __name__ == "__main__":
    main()
