"""Who runs the extraction engine: this process, local ones (one a GPU), or the workers of a Dask scheduler.

All do the same: they take shards of one store that nobody has in hand until none is left. So a worker that dies costs
the shard it was at, another machine may join at any time, and the store does not depend on who made it.
"""

import json
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import xarray as xr

from cache.writer import Writer
from pipeline.backbones import create_backbone, get_spec, preprocessing
from pipeline.backbones.encoder import Encoder
from pipeline.config import BackboneConfig, ComputeConfig, ExtractConfig
from pipeline.data import image_store as images
from pipeline.device import device_for_rank, resolve_device
from pipeline.errors import UserError
from pipeline.extraction import batch_size, engine, estimate

# Seconds between looks at which workers there are.
_PATIENCE = 0.5
# Workers that may die with no shard finished between them.
_DEATHS = 4
# A process computes for one store at a time, also if its Dask worker has several threads.
_ALONE = threading.Lock()


@dataclass(frozen=True)
class ExtractionJob:
    """One cell of the grid, ready to be sent to a worker: paths must mean the same on every machine.

    Attributes:
        name: of the backbone.
        images: the images store.
        weights: the folder that the fetch stage made.
        scratch, final: where the store is built, and where it appears.
        threads: of a processor's forward; sums of floats depend on it in their last digits.
    """

    name: str
    backbone: BackboneConfig
    extract: ExtractConfig
    device: str
    images: Path
    weights: Path
    scratch: Path
    final: Path
    threads: int = field(default_factory=torch.get_num_threads)


def launch(task: ExtractionJob, compute: ComputeConfig) -> dict:
    """Extract, wherever `compute` says; returns what the store says of itself, with its content digest.

    Raises:
        UserError: workers that may have different devices, or that all die.
    """
    if compute.scheduler and task.device == "auto":
        raise UserError("compute.device is 'auto', and the scheduler's workers may differ. Set it to cuda or cpu.")
    if not compute.scheduler:
        # More threads than cores would wait for one another.
        task = replace(
            task, device=resolve_device(task.device), threads=max(1, task.threads // max(1, compute.workers))
        )
    if not compute.scheduler and not compute.workers:
        return extract_shards(task, clear=True)
    with _client(compute) as client:
        return _wait_for_workers(client, task)


def _wait_for_workers(client, task: ExtractionJob) -> dict:
    """Have every worker there is, and every one that joins, work at the store until one says that it is finished."""
    given, before, died, waits = {}, -1, 0, False
    while True:
        there = client.scheduler_info(n_workers=-1)["workers"]
        if not there and not waits:
            print(f"{client.scheduler.address} has no workers; waiting for one", file=sys.stderr, flush=True)
        waits = not there
        gone, safe = len(given.keys() - there), len(list(task.scratch.glob("*/shards/*.json")))
        if safe != before:
            before, died = safe, gone
        if gone - died >= _DEATHS:
            raise UserError(
                f"{_DEATHS} workers died one after another without finishing a shard. See their logs; where memory "
                "ran out, set extract.batch or extract.shard lower."
            )
        for address, worker in there.items():
            if address not in given:
                beside = {given[other][1] for other in given if there.get(other, {}).get("host") == worker["host"]}
                index = next(number for number in range(len(beside) + 1) if number not in beside)
                future = client.submit(extract_shards, task, index, workers=[address], allow_other_workers=False, pure=False)
                given[address] = future, index
        futures = [future for address, (future, _) in given.items() if address in there]
        if finished := [future for future in futures if future.status == "finished"]:
            return finished[0].result()
        if futures and all(future.status == "error" for future in futures):
            raise futures[0].exception()
        time.sleep(_PATIENCE)


def extract_shards(task: ExtractionJob, index: int = 0, clear: bool = False) -> dict:
    """Take shards until none is left, and finish the store.

    Args:
        index: of the GPU, on a machine with several.
        clear: remove what extractions of other inputs left behind.
    """
    with _ALONE:
        return _work(task, index, clear)


def _work(task: ExtractionJob, index: int, clear: bool) -> dict:
    torch.set_num_threads(task.threads)  # Dask gives its workers one
    pictures, where = images.open_images(task.images), resolve_device(task.device)
    declared = get_spec(task.backbone)
    given = preprocessing.make_preprocessor(pictures, task.name, task.backbone, declared)
    weights = json.loads((task.weights / "source.json").read_text())
    said = engine.provenance(pictures, task.name, task.backbone, declared, given, weights, task.extract, where)
    scratch = engine.working_dir(task.scratch, said, task.extract, clear)
    if where == "cuda":
        torch.cuda.set_device(device_for_rank(where, index))
    network = create_backbone(task.backbone, declared, given.input_bands, task.weights)
    encoder = Encoder(given, network, where, task.extract.precision, task.extract.compiled, declared.strides)
    said["batch"] = batch = _batch(task, pictures, encoder, said, scratch)
    seen = estimate.dry_run(pictures, encoder, batch)
    layout = engine.make_layout(pictures, declared, seen.pyramid, task.backbone.input_size, task.extract)
    print(estimate.format_estimate(layout, seen, scratch, f"{task.images.stem} x {task.name}"), file=sys.stderr)
    writer = Writer(scratch, layout, task.final, said)
    engine.extract(pictures, encoder, writer, batch)
    measured = {"precision_error": seen.precision_error} if seen.precision_error else {}
    return {**said, **measured, "content_sha256": writer.finish(measured)}


def _batch(task: ExtractionJob, pictures: xr.Dataset, encoder: Encoder, said: Mapping, scratch: Path) -> int:
    """Images a forward: as told, or else found; a shard's at most, since a batch does not reach into the next."""
    extract = task.extract
    find = partial(batch_size.find_batch_size, pictures, encoder, extract.shard, len(extract.views))
    if extract.batch:
        return min(extract.batch, extract.shard)
    if encoder.device == "cpu":
        return find()
    # A worker that is late finds the store published, and what the others agreed on gone.
    known = batch_size.batch_of_existing_store(task.final, said, extract.views) or batch_size.shared_choice(scratch / "batch", find)
    return min(known, extract.shard)


@contextmanager
def _client(compute: ComputeConfig):
    from distributed import Client, LocalCluster

    if compute.scheduler:
        with Client(compute.scheduler) as client:
            yield client
    else:
        # Without a limit: Dask would kill a worker whose network and shards take more than its share.
        size = {"n_workers": compute.workers, "threads_per_worker": 1, "memory_limit": 0}
        with LocalCluster(**size, dashboard_address=None) as cluster, Client(cluster) as client:
            yield client
