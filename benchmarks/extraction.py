"""Speed of extraction compared with the bare forward pass, and its memory for four times the images.

    python -m benchmarks.extraction [lite0] [csmask_b4] [dofa_300m] [memory]     # by default all
    python -m benchmarks.extraction --device cuda [hiera_200m] …     # the four full-size models, in bfloat16

Needs `data/images` and `data/weights`, which `make run` leaves. A network whose weights were not fetched has random
ones, which take as long.

- `vs_forward`: images per second of the engine, from the images store on disk to the published feature store with its
  statistics, divided by those of the network alone on a preprocessed batch that is on the device. Both have the same
  batch and precision; medians over alternating rounds. On a GPU, whose clock falls as it warms up, the network runs
  before and after the engine. Imports and the construction of networks are not timed.
- On a CPU the stores have levels. A GPU is faster than a disk can store levels, so there `dense_…` is with levels,
  and the rest with pooled vectors only, as for classification datasets; `average_set_…` has as many images as the
  mean of GEO-Bench's twelve sets. The images were read once before, so that every network finds them in memory.
- `rss_growth`: peak memory of a process that extracts four times the images, relative to that of the images.

The figures are in benchmarks/results/extraction.json.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from benchmarks.features import FOLDER, change_images
from benchmarks.timing import save_results
from cache.schema import StoreSchema
from cache.writer import Writer
from pipeline import config
from pipeline.backbones import create_backbone, get_spec, preprocessing
from pipeline.backbones.encoder import Encoder
from pipeline.data import image_writer
from pipeline.data.image_store import open_images
from pipeline.device import resolve_device
from pipeline.extraction import engine, estimate

AVERAGE_SET_IMAGES = 104_000 // 12  # of GEO-Bench
SCRATCH = FOLDER / "extracting"
INPUT_SIZE = 224
CPU_CASES = {  # by backbone: dataset, images, batch (0: the one that the engine finds), rounds
    "lite0": ("sample-trees", 1024, 0, 3),
    "csmask_b4": ("sample-landuse-seg", 288, 0, 3),
    "dofa_300m": ("sample-landuse-seg", 48, 0, 3),
}
FULL_SIZE = ("hiera_200m", "prithvi_300m", "dofa_300m", "prithvi_600m")
# As many images as m-bigearthnet has, one of GEO-Bench's two largest sets.
GPU_CASES = dict.fromkeys(FULL_SIZE, ("sample-landuse-seg", 22_000, 256, 1))
# Images whose levels a GPU extracts.
DENSE_IMAGES = 1024
# Dataset, backbone and number of images, which is large enough to use every buffer of the engine.
MEMORY_CASE = ("sample-trees", "lite0", 256)
MEMORY_ROUNDS = 5


def repeat_images(dataset: str, count: int) -> xr.Dataset:
    """Open an images store of `count` samples that repeat a dataset's images; write it if needed."""
    path = FOLDER / f"{dataset}-{count}-images.zarr"
    if not path.exists():
        images = open_images(Path(f"data/images/{dataset}.zarr"))
        rows = np.arange(count) % len(images.sample)
        repeated = change_images(images, rows, sample=[f"{row}" for row in range(count)])
        image_writer.write(repeated, FOLDER / "scratch-images", path)
    images = open_images(path)
    for start in range(0, count, 64):  # into the page cache, if it is large enough, as after `prepare`
        images.image[start : start + 64].load()
    return images


class ExtractionCase:
    """One backbone and the images that it encodes.

    Args:
        backbone: name in params.yaml.
        dataset: name in params.yaml.
        count: number of images.
        batch: images per forward pass; 0 for what the engine finds.
        device: `cpu` or `cuda`.
        precision: of the forward pass.
    """

    def __init__(self, backbone: str, dataset: str, count: int, batch: int, device: str, precision: str):
        params = config.load()
        weights = Path(f"data/weights/{backbone}")
        settings = replace(params.backbone(backbone), input_size=INPUT_SIZE)
        is_fetched = (weights / str(get_spec(settings).weights_file)).is_file()
        settings = replace(settings, weights="pretrained" if is_fetched else "random")
        self.images, self.spec = repeat_images(dataset, count), get_spec(settings)
        preprocessor = preprocessing.make_preprocessor(self.images, backbone, settings, self.spec)
        network = create_backbone(settings, self.spec, preprocessor.input_bands, weights)
        self.encoder = Encoder(preprocessor, network, device, precision, strides=self.spec.strides)
        self.batch = batch or estimate.find_batch_size(self.images, self.encoder, params.extract.shard)
        # A batch does not span two shards, and the engine and the network alone must have the same batches.
        shard_size = max(params.extract.shard, self.batch)
        self.extract = replace(
            params.extract, batch=self.batch, shard=shard_size, keep_levels=True, precision=precision
        )
        self.dry_run = estimate.dry_run(self.images, self.encoder, 4)

    def extract_levels(self, count: int | None = None) -> float:
        """Return the images per second from store to store with levels, of the first `count` images or all."""
        images = self.images.isel(sample=slice(0, count))
        return self._extract(images, self._schema(images))

    def extract_pooled(self, count: int | None = None) -> float:
        """Return the images per second from store to store with pooled vectors only."""
        images = self.images.isel(sample=slice(0, count))
        return self._extract(images, replace(self._schema(images), levels=()))

    def forward(self, count: int | None = None) -> float:
        """Return the images per second of the network alone.

        Args:
            count: images; None for as many as the engine has, since a GPU's clock falls as it warms up.
        """
        batch = self.encoder.prepare(self.images.image[: self.batch].values)
        metadata = self.encoder.preprocessor.metadata(self.images, slice(0, self.batch))
        metadata = {name: torch.from_numpy(values).to(self.encoder.device) for name, values in metadata.items()}
        n_batches = max(1, (count or len(self.images.sample)) // self.batch)
        self._synchronize()
        start = time.perf_counter()
        for _ in range(n_batches):
            self.encoder.forward(batch, metadata)
        self._synchronize()
        return n_batches * self.batch / (time.perf_counter() - start)

    def _schema(self, images: xr.Dataset) -> StoreSchema:
        return engine.make_schema(images, self.spec, self.dry_run.pyramid, INPUT_SIZE, self.extract)

    def _extract(self, images: xr.Dataset, schema: StoreSchema) -> float:
        shutil.rmtree(SCRATCH, ignore_errors=True)
        start = time.perf_counter()
        writer = Writer(SCRATCH / "scratch", schema, SCRATCH / "store.zarr", {})
        engine.extract(images, self.encoder, writer, self.batch)
        writer.finish()
        return len(schema.sample) / (time.perf_counter() - start)

    def _synchronize(self) -> None:
        if self.encoder.device != "cpu":
            torch.cuda.synchronize()


def measure(backbone: str, dataset: str, count: int, batch: int, rounds: int, device: str, precision: str) -> dict:
    """Measure one backbone; see the module's docstring."""
    case = ExtractionCase(backbone, dataset, count, batch, resolve_device(device), precision)
    if device == "cpu":
        functions = {"engine": case.extract_levels, "forward": case.forward}
    else:
        functions = {
            "forward_before": lambda: case.forward(count // 2),
            "engine": case.extract_pooled,
            "forward_after": lambda: case.forward(count // 2),
            "average_set": lambda: case.extract_pooled(AVERAGE_SET_IMAGES),
            "dense": lambda: case.extract_levels(DENSE_IMAGES),
        }
    case.forward(min(count, DENSE_IMAGES))
    case.extract_levels(min(count, DENSE_IMAGES))
    rates = [{name: function() for name, function in functions.items()} for _ in range(rounds)]
    shutil.rmtree(SCRATCH, ignore_errors=True)
    for rate in rates:
        if device != "cpu":
            rate["forward"] = statistics.harmonic_mean([rate.pop("forward_before"), rate.pop("forward_after")])
    result = {"images": count, "batch": case.batch, "precision": precision}
    for name in rates[0]:
        prefix = "" if name == "engine" else f"{name}_"
        result[f"{prefix}images_per_second"] = round(statistics.median(rate[name] for rate in rates), 2)
        if name != "forward":
            ratios = [rate[name] / rate["forward"] for rate in rates]
            result[f"{prefix}vs_forward"] = round(statistics.median(ratios), 3)
    return result | {f"{name}_precision_error": round(e, 5) for name, e in case.dry_run.precision_error.items()}


def peak_megabytes(count: int) -> float:
    """Return the peak resident memory of a process that extracts `count` images."""
    command = [sys.executable, "-m", "benchmarks.extraction", "--memory", str(count)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def memory() -> dict:
    """Measure peak memory for some images and four times as many; medians, since runs differ by 20 %."""
    counts = [MEMORY_CASE[2], 4 * MEMORY_CASE[2]]
    for count in counts:  # not in the processes that are measured
        repeat_images(MEMORY_CASE[0], count)
    peaks = [[peak_megabytes(count) for count in counts] for _ in range(MEMORY_ROUNDS)]
    shutil.rmtree(SCRATCH, ignore_errors=True)
    small, large = zip(*peaks, strict=True)
    return {
        "memory_images": counts,
        "peak_megabytes": [[round(peak) for peak in peaks_of_count] for peaks_of_count in (small, large)],
        "rss_growth": round(statistics.median(large) / statistics.median(small), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("parts", nargs="*", metavar="part", help="backbones, or memory; by default all")
    arguments = parser.parse_args()
    if arguments.memory:
        dataset, backbone, _ = MEMORY_CASE
        ExtractionCase(backbone, dataset, arguments.memory, 0, "cpu", "float32").extract_levels()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(int(status["VmHWM"].split()[0]) / 1024)
        return
    cases = CPU_CASES if arguments.device == "cpu" else GPU_CASES
    precision = "float32" if arguments.device == "cpu" else "bfloat16"
    names = [*cases, "memory"]
    if unknown := set(arguments.parts) - set(names):
        parser.error(f"There is no part {', '.join(unknown)}; there are {', '.join(names)}.")
    results = {
        name: memory() if name == "memory" else measure(name, *cases[name], arguments.device, precision)
        for name in arguments.parts or names
    }
    save_results("extraction" if arguments.device == "cpu" else "extraction_gpu", results)


if __name__ == "__main__":
    main()
