"""Preparing GEO-Bench against plain h5py reading the same files: python -m benchmarks.prepare

Theirs reads every array of a file, and nothing else. `read` is our reader: the same arrays, and the pickles, without
running them. `prepare` also checks, hashes and writes the images store: by one process, and by one a core, started
anew. Ratios are samples a second of each core used, ours over theirs, medians over alternating rounds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from benchmarks.timing import seconds
from pipeline.datasets import geobench
from pipeline.imagery import imagestore
from pipeline.params import Dataset
from tests import geobench_files

ROUNDS = 3
SETS = {"m-eurosat": 4000, "m-bigearthnet": 1200, "m-chesapeake-landcover": 900}


def main() -> None:
    """Print the ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, help="where files are written; a fast disk, by default a temporary one"
    )
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    found = {"cores": cores}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        root = Path(folder)
        scene, photo, mask = _pixels()
        for name, samples in SETS.items():
            counts = (samples - samples // 2, samples // 4, samples // 4)
            files = geobench_files.write(name, root, scene, photo, mask, counts)
            paces: dict[str, list[float]] = {"theirs": [], "read": [], "prepare": [], "prepare_all_cores": []}
            for _ in range(ROUNDS):
                paces["theirs"].append(samples / seconds(partial(_plain, files)))
                paces["read"].append(samples / seconds(partial(_read, root, name)))
                paces["prepare"].append(samples / seconds(partial(_prepare, root, name, 1)))
                paces["prepare_all_cores"].append(samples / seconds(partial(_prepare, root, name, cores)) / cores)
            theirs = statistics.median(paces.pop("theirs"))
            found[name] = {f"{way}_vs_h5py": round(statistics.median(one) / theirs, 3) for way, one in paces.items()}
            found[name]["h5py_samples_a_second"] = round(theirs)
            shutil.rmtree(files)
            print(name, found[name], file=sys.stderr)
        found["rss_growth"] = _growth(root, scene, photo, mask)
    print(json.dumps(found))


def _pixels():
    """Pixels of the kinds that the sets hold; what they show does not matter here."""
    generator = np.random.default_rng(0)
    scene = generator.integers(0, 5000, (13, 768, 768)).astype(np.uint16)
    photo = generator.integers(0, 255, (3, 768, 768)).astype(np.uint8)
    return scene, photo, generator.integers(0, 7, (768, 768)).astype(np.uint8)


def _plain(files: Path) -> None:
    for path in sorted(files.glob("*.hdf5")):
        with h5py.File(path, "r") as file:
            np.stack([np.array(file[key]) for key in sorted(file) if key != "label"])
            _ = [np.array(file[key]) for key in file if key == "label"]


def _stream(root: Path, name: str):
    (root / "source.json").write_text(json.dumps(geobench.locate(geobench.SETS[name], "default", root)))
    return geobench.prepare(root, Dataset("geobench", options={"set": name}))


def _read(root: Path, name: str) -> None:
    stream = _stream(root, name)
    memory = np.empty(stream.shape, stream.dtype)
    for sample in stream.sample:
        stream.read(sample, memory)


def _prepare(root: Path, name: str, workers: int) -> None:
    imagestore.write(_stream(root, name), root / "scratch", root / "store.zarr", workers)
    shutil.rmtree(root / "store.zarr")


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
    peaks = []
    for samples in (400, 1600):
        shutil.rmtree(root / "classification_v1.0", ignore_errors=True)
        geobench_files.write("m-bigearthnet", root, scene, photo, mask, (samples - 8, 4, 4))
        done = subprocess.run([sys.executable, "-c", _ALONE, root], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    return round(peaks[1] / peaks[0], 3)


if __name__ == "__main__":
    main()
