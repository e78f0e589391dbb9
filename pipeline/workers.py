"""Who runs the extraction engine: this process, local ones (one a GPU), or the workers of a Dask scheduler.

All do the same: they take shards of one store that nobody has in hand until none is left. So a worker that dies costs
the shard it was at, another machine may join at any time, and the store does not depend on who made it.
"""

import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cache.write import Writer
from pipeline import extract as engine
from pipeline import images, inputs, preflight
from pipeline.backbones import build, spec
from pipeline.compute import device, nth
from pipeline.encode import Encoder
from pipeline.params import Backbone, Compute, Extract

# A task whose worker died is given to another this often.
_RETRIES = 3


@dataclass(frozen=True)
class Extraction:
    """One cell of the grid, ready to be sent to a worker: paths must mean the same on every machine.

    Attributes:
        name: of the backbone.
        images: the images store.
        weights: the folder that the fetch stage made.
        scratch, final: where the store is built, and where it appears.
        threads: of a processor's forward; sums of floats depend on it in their last digits.
    """

    name: str
    backbone: Backbone
    extract: Extract
    device: str
    images: Path
    weights: Path
    scratch: Path
    final: Path
    threads: int = field(default_factory=torch.get_num_threads)


def run(task: Extraction, compute: Compute) -> dict:
    """Extract, wherever `compute` says; returns what the store says of itself, with its content digest."""
    if not compute.scheduler and not compute.workers:
        return work(task)
    with _client(compute) as (client, count):
        futures = [client.submit(work, task, index, pure=False, retries=_RETRIES) for index in range(count)]
        return client.gather(futures)[0]


def work(task: Extraction, index: int = 0) -> dict:
    """Take shards until none is left, and finish the store.

    Args:
        index: of the GPU, on a machine with several.
    """
    torch.set_num_threads(task.threads)  # Dask gives its workers one
    pictures, where = images.open_images(task.images), device(task.device)
    declared = spec(task.backbone)
    given = inputs.describe(pictures, task.name, task.backbone, declared)
    weights = json.loads((task.weights / "source.json").read_text())
    said = engine.provenance(pictures, task.name, task.backbone, declared, given, weights, task.extract, where)
    scratch = engine.scratch_path(task.scratch, said, task.extract)
    if where == "cuda":
        torch.cuda.set_device(nth(where, index))
    encoder = Encoder(
        given,
        build(task.backbone, declared, given.seen, task.weights),
        nth(where, index),
        task.extract.precision,
        task.extract.compiled,
        declared.strides,
    )
    batch = task.extract.batch or preflight.largest_batch(pictures, encoder)
    seen = preflight.look(pictures, encoder, batch)
    layout = engine.make_layout(pictures, declared, seen.pyramid, task.backbone.input_size, task.extract)
    print(preflight.announce(layout, seen.rate, scratch, f"{task.images.stem} x {task.name}"), file=sys.stderr)
    writer = Writer(scratch, layout, task.final, said)
    try:
        engine.extract(pictures, encoder, writer, batch)
    finally:
        writer.release()
    measured = {"precision_error": seen.precision_error} if seen.precision_error else {}
    return {**said, **measured, "content_sha256": writer.finish(measured)}


@contextmanager
def _client(compute: Compute):
    """A Dask client, and how many tasks to send."""
    from distributed import Client, LocalCluster

    if compute.scheduler:
        with Client(compute.scheduler) as client:
            yield client, max(1, len(client.scheduler_info(n_workers=-1)["workers"]))
    else:
        with (
            LocalCluster(n_workers=compute.workers, threads_per_worker=1, dashboard_address=None) as cluster,
            Client(cluster) as client,
        ):
            yield client, compute.workers
