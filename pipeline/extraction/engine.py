"""The extraction engine: one pass of one frozen backbone over one images store, shard by shard.

Three steps run at the same time:
1. the loader reads the next images, in one thread, or in several for a GPU (pipeline/extraction/loader.py),
2. the device encodes, on a CPU two batches in parallel (pipeline/backbones/encoder.py),
3. a thread writes the finished shards.

Any number of processes may work on one store (pipeline/extraction/launch.py).
"""

import queue
import shutil
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
import xarray as xr
from tqdm import tqdm

import cache.writer
from cache import codecs, running_stats
from cache import schema as store_schema
from cache.checksums import fingerprint
from cache.schema import LevelSchema, StoreSchema
from cache.writer import Writer
from pipeline import bands
from pipeline.backbones import base, preprocessing
from pipeline.backbones import encoder as backbone_encoder
from pipeline.backbones.base import BackboneSpec, FeaturePyramid
from pipeline.backbones.encoder import Encoder
from pipeline.backbones.preprocessing import Preprocessor
from pipeline.config import BackboneConfig, ExtractConfig
from pipeline.data import augmentation
from pipeline.data.download import file_sha256
from pipeline.extraction import buffer, estimate, loader
from pipeline.extraction.buffer import ShardBuffer
from pipeline.tasks import get_task

# Modules whose code affects the bytes of a store. The family's module is in the digest of the weights' folder.
_CODE = (
    bands, base, preprocessing, backbone_encoder, augmentation, buffer, estimate, loader, store_schema, codecs,
    running_stats, cache.writer,
)  # fmt: skip
# Shards in memory: one is filled while another is written. On a GPU more, if all together are below
# `_SMALL_BYTES`, so that a slow write does not stop the GPU.
_SHARDS, _SMALL_SHARDS, _SMALL_BYTES = 2, 4, 2**26


def working_dir(folder: Path, provenance: Mapping, extract: ExtractConfig, clear: bool = True) -> Path:
    """Return the subfolder of one unfinished extraction, named by the fingerprint of its inputs and code.

    The same inputs resume there after a kill; other inputs or other code start a new folder. `clear` deletes the
    unfinished extractions of others from `folder`.
    """
    code = [file_sha256(Path(file)) for file in (__file__, *(module.__file__ for module in _CODE))]
    path = folder / fingerprint(provenance, extract, code)[:16]
    for other in folder.glob("[!.]*"):
        if clear and other != path:
            shutil.rmtree(other, ignore_errors=True)
    return path


def extract(images: xr.Dataset, encoder: Encoder, writer: Writer, batch: int) -> None:
    """Encode every sample of the shards that no other process claims, and write them.

    The writer may have shards of an earlier run. It is complete at the end. A forward pass takes `batch` images.
    """
    schema, download = writer.schema, loader.DeviceCopies(encoder.device)
    free_buffers: queue.SimpleQueue[ShardBuffer] = queue.SimpleQueue()
    for _ in range(_n_buffers(schema, encoder.device)):
        free_buffers.put(ShardBuffer(schema, download))

    def encode(encoder: Encoder, loaded: loader.LoadedBatch, shard_buffer: ShardBuffer, rows: slice):
        """Encode a batch into rows of the shard; returns the event of its copies."""
        images, metadata = loader.wait_for_upload(loaded)
        views = [encoder.forward(encoder.preprocessor(image), metadata).arrays() for image in images]
        for name in schema.shapes():
            values = torch.stack([arrays[name] for arrays in views], dim=1) if schema.views else views[0][name]
            shard_buffer.put(rows, name, values)
        return download.event()

    def store(shard: int, shard_buffer: ShardBuffer, encoded: list[Future]) -> None:
        """Wait for all batches of a shard, and write it."""
        try:
            for copied in _wait_all(encoded):
                if copied:
                    copied.synchronize()
            writer.write(shard, *shard_buffer.collect(n_rows[shard]))
            progress.update(n_rows[shard])
        finally:
            free_buffers.put(shard_buffer)

    shard_rows = [schema.rows(shard) for shard in range(schema.n_shards)]
    n_rows = [rows.stop - rows.start for rows in shard_rows]
    n_finished = sum(n_rows) - sum(n_rows[shard] for shard in writer.pending_shards())
    with (
        tqdm(total=sum(n_rows), initial=n_finished, unit="image", mininterval=2, file=sys.stderr) as progress,
        backbone_encoder.device_threads(1, encoder.device) as disk_thread,
        backbone_encoder.ParallelEncoder(encoder) as parallel,
        ExitStack() as stack,
    ):
        writes, encoded, shard_buffer = deque(), [], None
        batches = stack.enter_context(loader.load_batches(images, encoder, writer, batch))
        # On an error this runs before the loader closes: its thread may be waiting for a shard.
        stack.callback(writer.release)
        for shard, rows, loaded in batches:
            first, last = shard_rows[shard].start, shard_rows[shard].stop
            if rows.start == first:
                shard_buffer, encoded = free_buffers.get(), []
            target_rows = slice(rows.start - first, rows.stop - first)
            encoded.append(parallel.submit(encode, loaded, shard_buffer, target_rows))
            if rows.stop == last:
                writes.append(disk_thread.submit(store, shard, shard_buffer, encoded))
            while writes and writes[0].done():
                writes.popleft().result()
        for write in writes:
            write.result()


def _n_buffers(schema: StoreSchema, device: str) -> int:
    """Return how many shards are in memory."""
    shard_bytes = estimate.nbytes(schema) / len(schema.sample) * schema.shard_size
    return _SMALL_SHARDS if device != "cpu" and _SMALL_SHARDS * shard_bytes <= _SMALL_BYTES else _SHARDS


def _wait_all(futures: Sequence[Future]) -> list:
    """Return all results once all futures have ended, also if one failed: their memory is used again.

    `concurrent.futures.wait` would not wake up if they are cancelled while it waits.
    """
    for future in futures:
        with suppress(BaseException):
            future.result()
    return [future.result() for future in futures]


def make_schema(
    images: xr.Dataset, spec: BackboneSpec, pyramid: FeaturePyramid, input_size: int, extract: ExtractConfig
) -> StoreSchema:
    """Make a store's schema: pooled vectors; levels for a dense task or with `extract.keep_levels`.

    `pyramid`, the features of any images, gives the shapes.
    """
    has_levels = extract.keep_levels or get_task(images.attrs["task"]).is_dense
    levels = []
    for level, layer in zip(pyramid.levels, spec.layers, strict=True):
        _, channels, height, width = level.shape
        levels.append(LevelSchema(channels, height, width, stride=input_size // width, layer=layer))
    return StoreSchema(
        sample=tuple(images.sample.values.tolist()),
        split=tuple(images.split.values.tolist()),
        levels=tuple(levels) if has_levels else (),
        pooled={name: vector.shape[1] for name, vector in pyramid.pooled.items()},
        dtype=extract.dtype,
        shard_size=extract.shard,
        codec=codecs.parse_codec(extract.codec),
        views=extract.views if len(extract.views) > 1 else (),
    )


def provenance(
    images: xr.Dataset, name: str, backbone: BackboneConfig, spec: BackboneSpec, preprocessor: Preprocessor,
    weights: Mapping, extract: ExtractConfig, device: str,
) -> dict:  # fmt: skip
    """Return the attributes of a feature store: everything that determines its content; no timestamp.

    `name` is the backbone's in params.yaml, `weights` the source.json of the weights' folder.
    """
    input_bands, image_bands = preprocessor.input_bands, images.band.values.tolist()
    return {
        "backbone": name,
        "family": backbone.family,
        "variant": backbone.variant,
        "weights": dict(weights),
        "bands": [image_bands[index] for index in input_bands.band_indices],
        "input_names": list(input_bands.input_names),
        "wavelengths_micrometre": list(input_bands.wavelengths),
        "normalisation": {
            "input_units": spec.input_units,
            "image_units": images.attrs["units"],
            "display_range": preprocessor.display_range,
            "statistics": preprocessor.normalisation,
            "mean": preprocessor.mean,
            "std": preprocessor.std,
        },
        "metadata_inputs": list(preprocessor.metadata_keys),
        "input_size": backbone.input_size,
        "resampling": spec.resize,
        "precision": extract.precision,
        "device": device,
        "task": images.attrs["task"],
        "classes": images.attrs["classes"],
        "images_sha256": images.attrs["content_sha256"],
        "licence": images.attrs["licence"],
    }
