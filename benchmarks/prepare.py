"""Preparing GEO-Bench datasets, compared with plain h5py that reads the same files.

    TMPDIR=<folder on a fast disk> python -m benchmarks.prepare

- `h5py` reads every array of a file, on one core, and does nothing else.
- `read`: our reader, which reads the same arrays, and the pickles without running them.
- `prepare`, `prepare_all_cores`: also checks, hashes and writes the images store, with one process or one per core.

Ratios are samples per second, divided by those of `h5py`: medians over alternating rounds in new processes, with
files in the page cache. `rss_growth` is the peak memory of preparing 1600 samples, divided by that of preparing 400.
"""

import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from benchmarks.timing import save_results, seconds
from pipeline.config import DatasetConfig
from pipeline.data import image_writer
from pipeline.data.sources import geobench

ROUNDS = 3
N_SAMPLES = {"m-eurosat": 2000, "m-bigearthnet": 1600, "m-chesapeake-landcover": 2500}


def main() -> None:
    """Measure the ratios and save them."""
    results, peaks = {}, []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, n_samples in N_SAMPLES.items():
            results[name] = _measure(root, name, _write_files(root, name, n_samples), n_samples)
        for n_samples in (400, 1600):
            _write_files(root, "m-bigearthnet", n_samples)
            peaks.append(_in_process(partial(_peak_memory, root)))
        results["rss_growth"] = round(peaks[1] / peaks[0], 3)
    save_results("prepare", results)


def _write_files(root: Path, name: str, n_samples: int) -> Path:
    """Replace the files of all sets below `root` by those of one set, with random pixels."""
    from tests import geobench_files  # the processes of the benchmark import this module, and need no rasterio

    for folder in root.glob("*_v1.0"):
        shutil.rmtree(folder)
    draw = np.random.default_rng(0).integers
    scene, photo = draw(0, 5000, (13, 768, 768), np.uint16), draw(0, 255, (3, 768, 768), np.uint8)
    counts = (n_samples - n_samples // 2, n_samples // 4, n_samples // 4)
    return geobench_files.write(name, root, scene, photo, draw(0, 7, (768, 768), np.uint8), counts)


def _measure(root: Path, name: str, files: Path, n_samples: int) -> dict[str, float]:
    cases = {
        "h5py": partial(_read_with_h5py, files),
        "read": partial(_read, root, name),
        "prepare": partial(_prepare, root, name, 1),
        "prepare_all_cores": partial(_prepare, root, name, len(os.sched_getaffinity(0))),
    }
    # The first round loads the files into the page cache.
    rounds = [{case: _in_process(partial(seconds, cases[case])) for case in cases} for _ in range(ROUNDS + 1)]
    medians = {case: statistics.median(times[case] for times in rounds[1:]) for case in cases}
    ratios = {f"{case}_vs_h5py": round(medians["h5py"] / medians[case], 3) for case in cases if case != "h5py"}
    return ratios | {"h5py_samples_per_second": round(n_samples / medians["h5py"])}


def _in_process(work: partial) -> float:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work).result()


def _read_with_h5py(files: Path) -> None:
    for path in files.glob("*.hdf5"):
        with h5py.File(path, "r") as file:
            [np.array(dataset) for dataset in file.values()]


def _open(root: Path, name: str):
    (root / "source.json").write_text(json.dumps(geobench.describe_files(geobench.SETS[name], "default", root)))
    return geobench.prepare(root, DatasetConfig("geobench", options={"set": name}))


def _read(root: Path, name: str) -> None:
    dataset = _open(root, name)
    for sample in dataset.sample:
        dataset.read_sample(sample)


def _prepare(root: Path, name: str, workers: int) -> None:
    image_writer.write(_open(root, name), root / "scratch", root / "store.zarr", workers)


def _peak_memory(root: Path) -> int:
    _prepare(root, "m-bigearthnet", 1)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0])  # ru_maxrss includes the memory of the parent


if __name__ == "__main__":
    main()
