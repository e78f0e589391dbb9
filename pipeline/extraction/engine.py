"""The extraction engine: one pass of one frozen backbone over one images store, shard by shard.

Three things happen at once: the next images are read, by one thread or for a GPU by several
(pipeline/extraction/loader.py), the device computes (a processor two batches side by side), and a thread stores the
shard before. Any number of processes may run it on one store (pipeline/extraction/launch.py).
"""

import dataclasses
import hashlib
import json
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

from cache import casting, codecs, running_stats, schema, zarr_shard
from cache import writer as write
from cache.schema import LevelSchema, StoreSchema
from cache.writer import Writer
from pipeline import bands
from pipeline.backbones import base as pyramid
from pipeline.backbones import encoder as encode
from pipeline.backbones import preprocessing, resize
from pipeline.backbones.base import BackboneSpec, FeaturePyramid
from pipeline.backbones.encoder import Encoder
from pipeline.backbones.preprocessing import Preprocessor
from pipeline.config import BackboneConfig, ExtractConfig
from pipeline.data import augmentation
from pipeline.data.download import file_sha256
from pipeline.extraction import batch_size, buffer, cpu_parallel, estimate, loader, narrow
from pipeline.extraction.cpu_parallel import ParallelEncoder
from pipeline.extraction.transfer import DeviceToHost, threads, wait_for_upload

# Shards in memory: one being filled, one being stored. For a GPU more if all fit in so many bytes, so that a disk
# which takes its time now and then does not stop it.
_SHARDS, _SMALL_SHARDS, _SMALL = 2, 4, 2**26


def working_dir(folder: Path, described: Mapping, extract: ExtractConfig, clear: bool = True) -> Path:
    """The place in `folder` of one extraction before it is published, named by everything that decides its bytes.

    The same inputs resume there after a kill; other inputs or other code start afresh.

    Args:
        clear: remove what an earlier extraction of other inputs left in `folder`.
    """
    modules = (
        bands,
        batch_size,
        buffer,
        encode,
        loader,
        preprocessing,
        cpu_parallel,
        narrow,
        pyramid,
        resize,
        augmentation,
        schema,
        codecs,
        casting,
        running_stats,
        zarr_shard,
        write,
    )
    code = [file_sha256(Path(file)) for file in (__file__, *[module.__file__ for module in modules])]
    decides = {**described, "code": code, "extract": dataclasses.asdict(extract)}
    path = folder / hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    for old in folder.glob("[!.]*"):
        if clear and old != path:
            shutil.rmtree(old, ignore_errors=True)
    return path


def extract(images: xr.Dataset, encoder: Encoder, writer: Writer, batch: int) -> None:
    """Encode every sample that no other process encodes, once, and write what the layout keeps.

    Args:
        writer: which may have shards from an earlier run; nothing is pending in it at the end.
        batch: images per forward.
    """
    layout, download = writer.schema, DeviceToHost(encoder.device)
    count = len(layout.sample)
    done = count - sum(layout.rows(number).stop - layout.rows(number).start for number in writer.pending_shards())
    shards, memory = _shards(layout, encoder.device), queue.SimpleQueue()
    for _ in range(shards):
        memory.put(buffer.ShardBuffer(layout, download))
    bar = tqdm(total=count, initial=done, unit="image", mininterval=2, file=sys.stderr)
    with (
        bar as progress,
        threads(1, encoder.device) as disk,
        ParallelEncoder(encoder) as beside,
        ExitStack() as stack,
    ):

        def encode(own: Encoder, given: tuple, filled: buffer.ShardBuffer, rows: slice):
            for name, values in _encode(own, given, layout).items():
                filled.put(rows, name, values)
            return download.event()

        def store(number: int, filled: buffer.ShardBuffer, encoded: list) -> None:
            try:
                for copied in _wait_all(encoded):
                    if copied:
                        copied.synchronize()
                rows = layout.rows(number)
                writer.write(number, *filled.take(rows.stop - rows.start))
                progress.update(rows.stop - rows.start)
            finally:
                memory.put(filled)

        storing, encoding, filled = deque(), [], None
        batches = stack.enter_context(loader.batches(images, encoder, writer, batch))
        stack.callback(writer.release)  # first, if anything fails: the reading thread may be waiting for a shard
        for number, rows, given in batches:
            first, last = layout.rows(number).start, layout.rows(number).stop
            if rows.start == first:
                filled, encoding = memory.get(), []
            encoding.append(beside.submit(encode, given, filled, slice(rows.start - first, rows.stop - first)))
            if rows.stop == last:
                storing.append(disk.submit(store, number, filled, encoding))
            while storing and (storing[0].done() or len(storing) == shards):
                storing.popleft().result()
        for one in storing:
            one.result()


def _shards(layout: StoreSchema, device: str) -> int:
    """How many are in memory."""
    small = _SMALL_SHARDS * layout.shard_size * estimate.nbytes(layout) <= _SMALL * len(layout.sample)
    return _SMALL_SHARDS if small and device != "cpu" else _SHARDS


def make_layout(
    images: xr.Dataset, spec: BackboneSpec, pyramid: FeaturePyramid, input_size: int, extract: ExtractConfig
) -> StoreSchema:
    """The store's layout; classification sets keep pooled vectors alone unless dense levels are asked for."""
    dense = extract.keep_levels or images.attrs["task"] == "segmentation"
    levels = [
        LevelSchema(*level.shape[1:], stride=input_size // level.shape[-1], layer=layer)
        for level, layer in zip(pyramid.levels, spec.layers, strict=True)
    ]
    return StoreSchema(
        sample=tuple(images.sample.values.tolist()),
        split=tuple(images.split.values.tolist()),
        levels=tuple(levels) if dense else (),
        pooled={name: vector.shape[1] for name, vector in pyramid.pooled.items()},
        dtype=extract.dtype,
        shard_size=extract.shard,
        codec=codecs.parse_codec(extract.codec, extract.dtype),
        views=extract.views if len(extract.views) > 1 else (),
    )


def provenance(images: xr.Dataset, name: str, backbone: BackboneConfig, spec: BackboneSpec, given: Preprocessor, weights: Mapping,
               extract: ExtractConfig, device: str) -> dict:  # fmt: skip
    """What the store says of itself: everything that decides its content, and no timestamp."""
    return {
        "backbone": name,
        "family": backbone.family,
        "variant": backbone.variant,
        "weights": dict(weights),
        "bands": [images.band.values.tolist()[place] for place in given.input_bands.band_indices],
        "network_bands": list(given.input_bands.input_names),
        "wavelengths_micrometre": list(given.input_bands.wavelengths),
        "normalisation": {
            "eats": spec.input_units,
            "images_units": images.attrs["units"],
            "display": given.display_range,
            "of": given.normalisation,
            "mean": given.mean,
            "std": given.std,
        },
        "place_and_time": list(given.metadata_keys) or False,
        "input_size": backbone.input_size,
        "resampling": spec.resize,
        "precision": extract.precision,
        "device": device,
        "task": images.attrs["task"],
        "classes": images.attrs["classes"],
        "images_sha256": images.attrs["content_sha256"],
        "licence": images.attrs["licence"],
    }


def _encode(encoder: Encoder, given: tuple, layout: StoreSchema) -> dict[str, torch.Tensor]:
    """What the layout keeps of a batch, by array path; with views each array is (sample, view, …)."""
    tensors, known = wait_for_upload(given)
    seen = [_flatten(encoder.forward(encoder.preprocessor.__call__(tensor), known), layout) for tensor in tensors]
    if not layout.views:
        return seen[0]
    return {name: torch.stack([one[name] for one in seen], dim=1) for name in seen[0]}


def _flatten(pyramid: FeaturePyramid, layout: StoreSchema) -> dict:
    arrays = {f"pooled/{name}": vector for name, vector in pyramid.pooled.items()}
    if layout.levels:
        arrays |= {f"level{index}/features": level for index, level in enumerate(pyramid.levels)}
    return arrays


def _wait_all(futures: Sequence[Future]) -> list:
    """What all have made, once all have ended, also if one failed: their memory is used again.

    `concurrent.futures.wait` would not wake up if they are cancelled while it waits.
    """
    for one in futures:
        with suppress(BaseException):
            one.result()
    return [one.result() for one in futures]
