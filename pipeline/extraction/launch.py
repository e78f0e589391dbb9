"""Launch the extraction engine in this process, in local ones (one per GPU), or on Dask workers.

All workers run the same loop: they claim shards of one store until none is left. If a worker dies, only the shard
that it had claimed is lost. Another machine may join at any time. The store's bytes do not depend on the workers.
"""

import json
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cache.writer import Writer
from pipeline.backbones import create_backbone, get_spec
from pipeline.backbones.encoder import Encoder
from pipeline.backbones.preprocessing import make_preprocessor
from pipeline.config import BackboneConfig, ComputeConfig, ExtractConfig
from pipeline.data.image_store import open_images
from pipeline.device import device_for_rank, resolve_device
from pipeline.errors import UserError
from pipeline.extraction import engine, estimate

# Seconds between checks of the list of workers.
_POLL_SECONDS = 0.5
# Workers in a row that may die without a finished shard.
_MAX_DEATHS = 4
# A process computes for one store at a time, also if its Dask worker has several threads.
_COMPUTE_LOCK = threading.Lock()


@dataclass(frozen=True)
class ExtractionJob:
    """An extraction of one dataset by one backbone, ready to be sent to a worker.

    Its paths must be the same on every machine.

    Attributes:
        name: the backbone's name in params.yaml.
        device: `auto`, `cpu` or `cuda`.
        weights_dir: the folder that the fetch stage wrote.
        scratch, final: where the store is built, and where it appears when finished.
        n_threads: threads of a forward pass on a CPU; the floating-point rounding of sums depends on it.
    """

    name: str
    backbone: BackboneConfig
    extract: ExtractConfig
    device: str
    images_path: Path
    weights_dir: Path
    scratch: Path
    final: Path
    n_threads: int = field(default_factory=torch.get_num_threads)


def launch(job: ExtractionJob, compute: ComputeConfig) -> dict:
    """Run an extraction in the processes that `compute` configures.

    Returns the store's attributes, with its content digest. Raises UserError: the workers' device is ambiguous, or
    too many workers die in a row.
    """
    if compute.scheduler and job.device == "auto":
        raise UserError(
            "compute.device is 'auto', but the workers of a scheduler may have different devices. Set it to cuda or "
            "cpu.",
            key="compute.device", value=job.device, allowed=("cuda", "cpu"),
        )  # fmt: skip
    if not compute.scheduler:
        # More threads than cores would wait for each other.
        n_threads = max(1, job.n_threads // max(1, compute.workers))
        job = replace(job, device=resolve_device(job.device), n_threads=n_threads)
    if not compute.scheduler and not compute.workers:
        return extract_shards(job, clear=True)
    with _dask_client(compute) as client:
        return _wait_for_workers(client, job)


def _wait_for_workers(client, job: ExtractionJob) -> dict:
    """Run the job on every worker, also on later ones, until one of them reports a finished store."""
    tasks: dict[str, tuple] = {}  # (future, rank) by worker's address
    n_finished_before, n_dead_before, is_waiting = -1, 0, False
    while True:
        workers = client.scheduler_info(n_workers=-1)["workers"]
        if not workers and not is_waiting:
            print(f"{client.scheduler.address} has no workers; waiting for one", file=sys.stderr, flush=True)
        is_waiting = not workers
        n_dead, n_finished = len(tasks.keys() - workers), len(list(job.scratch.glob("*/shards/*.json")))
        if n_finished != n_finished_before:
            n_finished_before, n_dead_before = n_finished, n_dead
        if n_dead - n_dead_before >= _MAX_DEATHS:
            raise UserError(
                f"{_MAX_DEATHS} workers in a row died without finishing a shard. Read their logs; if memory "
                "ran out, set extract.batch or extract.shard lower.",
                key="extract.shard", value=job.extract.shard,
            )  # fmt: skip
        for address in workers.keys() - tasks:
            rank = _free_rank(workers[address]["host"], tasks, workers)
            # pure=False: every call is a new task, although all have the same arguments.
            options = {"workers": [address], "allow_other_workers": False, "pure": False}
            tasks[address] = client.submit(extract_shards, job, rank, **options), rank
        futures = [future for address, (future, _) in tasks.items() if address in workers]
        if finished := [future for future in futures if future.status == "finished"]:
            return finished[0].result()
        if futures and all(future.status == "error" for future in futures):
            raise futures[0].exception()
        time.sleep(_POLL_SECONDS)


def _free_rank(host: str, tasks: Mapping[str, tuple], workers: Mapping[str, Mapping]) -> int:
    """Return the lowest rank that no living worker on the host has."""
    ranks = {rank for address, (_, rank) in tasks.items() if workers.get(address, {}).get("host") == host}
    return next(rank for rank in range(len(ranks) + 1) if rank not in ranks)


def extract_shards(job: ExtractionJob, rank: int = 0, clear: bool = False) -> dict:
    """Claim and extract shards until none is left, finish the store, and return what `launch` returns.

    Args:
        rank: number of the worker on its machine; selects its GPU.
        clear: delete what extractions of other inputs left in `job.scratch`.
    """
    with _COMPUTE_LOCK:
        torch.set_num_threads(job.n_threads)  # Dask sets one
        images, device, extract = open_images(job.images_path), resolve_device(job.device), job.extract
        if device == "cuda":
            torch.cuda.set_device(device_for_rank(device, rank))
        spec = get_spec(job.backbone)
        preprocessor = make_preprocessor(images, job.name, job.backbone, spec)
        weights = json.loads((job.weights_dir / "source.json").read_text())
        network = create_backbone(job.backbone, spec, preprocessor.input_bands, job.weights_dir)
        encoder = Encoder(preprocessor, network, device, extract.precision, extract.compiled, spec.strides)
        # A batch never spans two shards.
        batch = min(extract.batch, extract.shard) or estimate.find_batch_size(
            images, encoder, extract.shard, len(extract.views)
        )
        provenance = engine.provenance(images, job.name, job.backbone, spec, preprocessor, weights, extract, device)
        provenance["batch"] = batch
        scratch = engine.working_dir(job.scratch, provenance, extract, clear)
        result = estimate.dry_run(images, encoder, batch)
        schema = engine.make_schema(images, spec, result.pyramid, job.backbone.input_size, extract)
        description = f"{job.images_path.stem} x {job.name}"
        print(estimate.format_estimate(schema, result, scratch, description), file=sys.stderr)
        writer = Writer(scratch, schema, job.final, provenance)
        engine.extract(images, encoder, writer, batch)
        measurements = {"precision_error": result.precision_error} if result.precision_error else {}
        return {**provenance, **measurements, "content_sha256": writer.finish(measurements)}


@contextmanager
def _dask_client(compute: ComputeConfig):
    # distributed takes 1 s to import, and extraction in this process needs none of it
    from distributed import Client, LocalCluster

    if compute.scheduler:
        with Client(compute.scheduler) as client:
            yield client
    else:
        # Without a memory limit: Dask would kill a worker whose network and shards take more than its share.
        cluster_options = {"n_workers": compute.workers, "threads_per_worker": 1, "memory_limit": 0}
        with LocalCluster(**cluster_options, dashboard_address=None) as cluster, Client(cluster) as client:
            yield client
