"""The extract stage against the bare forward of the same network, and its memory for four times the images.

    python -m benchmarks.extraction [lite0] [csmask_b4] [dofa_300m] [memory]     # all, or some of them
    python -m benchmarks.extraction --device cuda [hiera_200m] …     # the four full-size models, in bfloat16

`vs_forward`: images a second of the engine, from the images store on disk to the published feature store with its
statistics, over those of the network alone on a prepared batch that already is on the device; same batch, same
precision, by turns, median over rounds; on a GPU, whose clock falls as it warms, the network before and after the
engine. Imports and the building of networks are left out of both. Networks whose
weights were not fetched have random ones, which take as long. Needs `data/images` and `data/weights` (`make run`
leaves them). On a processor the store has the levels; a GPU is faster than a disk takes them, so there `dense_…`
is with them and the rest with pooled vectors alone, as classification sets have: of as many images as GEO-Bench's
largest sets have, and (`average_set_…`) as its twelve have on average, in the shards and batches of the paper's
profile; the images were read once before, so that the
first network finds them where the others do. `plain_write` is what the disk takes of plain files, flushed.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from benchmarks.features import FOLDER, remade
from cache.writer import Writer
from pipeline import config
from pipeline import device as compute
from pipeline.backbones import create_backbone, get_spec, preprocessing
from pipeline.backbones.encoder import Encoder
from pipeline.data import image_writer
from pipeline.data.image_store import open_images
from pipeline.extraction import engine, estimate
from pipeline.extraction.cpu_parallel import ParallelEncoder

ALL_OF_GEO_BENCH, SETS = 104_000, 12
SCRATCH = FOLDER / "extracting"
CPU = {  # backbone: (dataset, images, batch or 0 for the one that the engine finds, rounds)
    "lite0": ("sample-trees-seg", 1024, 0, 3),
    "csmask_b4": ("sample-landuse-seg", 288, 0, 3),
    "dofa_300m": ("sample-landuse-seg", 48, 0, 3),
}
# As many images as m-bigearthnet has, of GEO-Bench's two largest sets.
FULL_SIZE = ("hiera_200m", "prithvi_300m", "dofa_300m", "prithvi_600m")
GPU = dict.fromkeys(FULL_SIZE, ("sample-landuse-seg", 22_000, 256, 1))
FEW = 1024  # of them with the levels, which are many bytes
# The dataset, the backbone, and n: so many that every buffer of the engine is in use.
MEMORY = ("sample-trees-seg", "lite0", 256)
PEAKS = 5


def repeated(dataset: str, count: int) -> xr.Dataset:
    """An images store of `count` samples: a dataset's images over and over, under names of their own."""
    path = FOLDER / f"{dataset}-{count}-images.zarr"
    if not path.exists():
        opened = open_images(Path(f"data/images/{dataset}.zarr"))
        rows = np.arange(count) % len(opened.sample)
        made = remade(opened, rows, sample=[f"{row}" for row in range(count)])
        image_writer.write(made, FOLDER / "scratch-images", path)
    opened = open_images(path)
    for start in range(0, count, 64):  # as `prepare` leaves it, in the system's memory if that holds it
        opened.image[start : start + 64].load()
    return opened


class Case:
    """One network and the images that it sees."""

    def __init__(self, backbone: str, dataset: str, count: int, batch: int, device: str, precision: str):
        described = config.load()
        trained = Path(f"data/weights/{backbone}")
        chosen = dataclasses.replace(described.backbone(backbone), input_size=224)
        fetched = (trained / str(get_spec(chosen).weights_file)).is_file()
        chosen = dataclasses.replace(chosen, weights="pretrained" if fetched else "random")
        self.images, self.described = repeated(dataset, count), described
        self.declared = get_spec(chosen)
        given = preprocessing.make_preprocessor(self.images, backbone, chosen, self.declared)
        network = create_backbone(chosen, self.declared, given.input_bands, trained)
        self.encoder = Encoder(given, network, device, precision, strides=self.declared.strides)
        self.batch = batch or estimate.find_batch_size(self.images, self.encoder, described.extract.shard)
        # A batch does not reach from one shard into the next, and both sides are to have the same.
        shard = max(described.extract.shard, self.batch)
        self.extract = dataclasses.replace(
            described.extract, batch=self.batch, shard=shard, keep_levels=True, precision=precision
        )
        self.look = estimate.dry_run(self.images, self.encoder, 4)

    def layout(self, images: xr.Dataset):
        return engine.make_schema(images, self.declared, self.look.pyramid, 224, self.extract)

    def engine(self) -> float:
        """Images a second from store to store, with the levels."""
        return self._stored(self.images, self.layout(self.images))

    def engine_pooled(self, count: int | None = None) -> float:
        """The same with pooled vectors alone, of the first images or all."""
        some = self.images.isel(sample=slice(0, count))
        return self._stored(some, dataclasses.replace(self.layout(some), levels=()))

    def engine_few(self) -> float:
        """With the levels, of the first images."""
        few = self.images.isel(sample=slice(0, FEW))
        return self._stored(few, self.layout(few))

    def plain_write(self) -> float:
        """Images a second that the disk takes as plain files of as many bytes a shard, each flushed."""
        shutil.rmtree(SCRATCH, ignore_errors=True)
        SCRATCH.mkdir(parents=True)
        layout = self.layout(self.images.isel(sample=slice(0, FEW)))
        block = np.random.default_rng(0).bytes(estimate.nbytes(layout) // FEW * layout.shard_size)
        begun = time.perf_counter()
        for number in range(FEW // layout.shard_size):
            with open(SCRATCH / f"{number}", "wb") as file:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())
        return FEW / (time.perf_counter() - begun)

    def _stored(self, images: xr.Dataset, layout) -> float:
        shutil.rmtree(SCRATCH, ignore_errors=True)
        begun = time.perf_counter()
        writer = Writer(SCRATCH / "scratch", layout, SCRATCH / "store.zarr", {})
        engine.extract(images, self.encoder, writer, self.batch)
        writer.finish()
        return len(layout.sample) / (time.perf_counter() - begun)

    def forward(self, side_by_side: bool = False, count: int | None = None) -> float:
        """Images a second of the network alone: batch after batch, or as many at once as the engine has.

        Of as many images as the engine has, or `count`: a GPU's clock is lower once it is warm.
        """
        image = self.images.image[: self.batch].values
        batch = self.encoder.prepare(image)
        known = self.encoder.preprocessor.metadata(self.images, slice(0, self.batch))
        known = {name: torch.from_numpy(each).to(self.encoder.device) for name, each in known.items()}
        times = max(1, (count or len(self.images.sample)) // self.batch)
        self._wait()
        begun = time.perf_counter()
        if side_by_side:
            with ParallelEncoder(self.encoder) as lanes:
                for one in [lanes.submit(Encoder.forward, batch, known) for _ in range(times)]:
                    one.result()
        else:
            for _ in range(times):
                self.encoder.forward(batch, known)
        self._wait()
        return times * self.batch / (time.perf_counter() - begun)

    def flops(self) -> float:
        """Of one image's forward."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self.encoder(self.images.image[:1].values, self.encoder.preprocessor.metadata(self.images, slice(0, 1)))
        return counter.get_total_flops()

    def _wait(self) -> None:
        if self.encoder.device != "cpu":
            torch.cuda.synchronize()


def measure(backbone: str, dataset: str, count: int, batch: int, rounds: int, device: str, precision: str) -> dict:
    case = Case(backbone, dataset, count, batch, compute.resolve_device(device), precision)
    on_cpu = device == "cpu"
    if on_cpu:
        works = warm_up = [case.engine, case.forward, lambda: case.forward(True)]
    else:
        average = ALL_OF_GEO_BENCH // SETS
        half = partial(case.forward, count=count // 2)
        works = [
            half,
            case.engine_pooled,
            half,
            partial(case.engine_pooled, average),
            case.engine_few,
            case.plain_write,
        ]
        warm_up = [partial(case.forward, count=FEW), case.engine_few]
    for work in warm_up:
        work()
    turns = [[work() for work in works] for _ in range(rounds)]
    shutil.rmtree(SCRATCH, ignore_errors=True)
    if not on_cpu:
        turns = [[ours, statistics.harmonic_mean([before, after]), *rest] for before, ours, after, *rest in turns]
    ours, bare, *others = (statistics.median(each) for each in zip(*turns, strict=True))

    def ratio(mine: int, theirs: int) -> float:
        return round(statistics.median(turn[mine] / turn[theirs] for turn in turns), 3)

    found = {
        "images": count,
        "batch": case.batch,
        "precision": precision,
        "images_per_second": round(ours, 2),
        "forward_images_per_second": round(bare, 2),
        "vs_forward": ratio(0, 1),
    }
    if on_cpu:
        return found | {"side_by_side_images_per_second": round(others[0], 2), "vs_side_by_side": ratio(0, 2)}
    flops = case.flops()
    return found | {
        "average_set_images": average,
        "average_set_vs_forward": ratio(2, 1),
        "dense_images_per_second": round(others[1], 2),
        "dense_vs_forward": ratio(3, 1),
        "plain_write_images_per_second": round(others[2], 2),
        "dense_vs_plain_write": ratio(3, 4),
        "gigaflops_an_image": round(flops / 1e9, 1),
        "share_of_measured_matrix_rate": round(ours * flops / matrix_rate(), 3),
        "minutes_for_all_of_geo_bench": round(ALL_OF_GEO_BENCH / ours / 60, 1),
        "precision_error": {name: round(error, 5) for name, error in case.look.precision_error.items()},
    }


def matrix_rate(side: int = 8192) -> float:
    """Operations a second of bfloat16 matrix products on this GPU."""
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(50):
        a @ b
    torch.cuda.synchronize()
    return 50 * 2 * side**3 / (time.perf_counter() - begun)


def peak(count: int) -> float:
    """Peak resident megabytes of a process that extracts so many images."""
    command = [sys.executable, "-m", "benchmarks.extraction", "--memory", str(count)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("parts", nargs="*", metavar="part", help="backbones, or memory; none for all")
    arguments = parser.parse_args()
    if arguments.memory:
        dataset, backbone, _ = MEMORY
        Case(backbone, dataset, arguments.memory, 0, "cpu", "float32").engine()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(int(status["VmHWM"].split()[0]) / 1024)
        return
    cases = CPU if arguments.device == "cpu" else GPU
    precision = "float32" if arguments.device == "cpu" else "bfloat16"
    known = [*cases, "memory"]
    if unknown := set(arguments.parts) - set(known):
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = arguments.parts or known
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    print(json.dumps({"machine": f"{os.cpu_count()} cores, {where}"}))
    for name in chosen:
        found = memory() if name == "memory" else {name: measure(name, *cases[name], arguments.device, precision)}
        print(json.dumps(found), flush=True)


def memory() -> dict:
    """Peak memory for some images and for four times as many: medians, since runs differ by a fifth."""
    counts = [MEMORY[2], 4 * MEMORY[2]]
    for count in counts:  # not in the processes that are measured
        repeated(MEMORY[0], count)
    peaks = [[peak(count) for count in counts] for _ in range(PEAKS)]
    shutil.rmtree(SCRATCH, ignore_errors=True)
    few, many = zip(*peaks, strict=True)
    return {
        "memory_images": counts,
        "peak_megabytes": [[round(one) for one in each] for each in (few, many)],
        "rss_growth": round(statistics.median(many) / statistics.median(few), 3),
    }


if __name__ == "__main__":
    main()
