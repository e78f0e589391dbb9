"""The extraction engine: one pass of one frozen backbone over one images store, shard by shard.

Three things happen at once: a thread reads the next images, the device computes, and a thread stores the shard
before. Any number of processes may run it on one store (pipeline/workers.py).
"""

import dataclasses
import hashlib
import json
import queue
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from cache import codecs, prepare, schema, shard, statistics, write
from cache.schema import Layout, Level
from cache.write import Writer
from pipeline import bands, encode, inputs, pyramid, views
from pipeline.archives import digest
from pipeline.encode import Encoder
from pipeline.inputs import Inputs
from pipeline.params import Backbone, Extract
from pipeline.pyramid import Pyramid, Spec

# Batches read ahead, and shards in memory: one being filled, one being stored.
_BATCHES, _SHARDS = 3, 2


def scratch_path(folder: Path, described: Mapping, extract: Extract, clear: bool = True) -> Path:
    """The place in `folder` of one extraction before it is published, named by everything that decides its bytes.

    The same inputs resume there after a kill; other inputs or other code start afresh.

    Args:
        clear: remove what an earlier extraction of other inputs left in `folder`.
    """
    modules = (bands, encode, inputs, pyramid, views, schema, codecs, prepare, shard, statistics, write)
    code = [digest(Path(file)) for file in (__file__, *[module.__file__ for module in modules])]
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
    layout = writer.layout
    count = len(layout.sample)
    done = count - sum(layout.rows(number).stop - layout.rows(number).start for number in writer.pending())
    memory = queue.SimpleQueue()
    for _ in range(_SHARDS):
        memory.put({})
    bar = tqdm(total=count, initial=done, unit="image", mininterval=2, file=sys.stderr)
    with bar as progress, ThreadPoolExecutor(1) as disk, ExitStack() as stack:

        def store(number: int, filled: dict, copied) -> None:
            try:
                if copied:
                    copied.synchronize()
                rows = layout.rows(number)
                length = rows.stop - rows.start
                writer.write(number, {name: tensor[:length].numpy() for name, tensor in filled.items()})
                progress.update(length)
            finally:
                memory.put(filled)

        storing, filled = deque(), None
        batches = stack.enter_context(closing(_ahead(_batches(images, encoder, writer, batch), encoder.device)))
        stack.callback(writer.release)  # first, if anything fails: the reading thread may be waiting for a shard
        for number, rows, given in batches:
            first, last = layout.rows(number).start, layout.rows(number).stop
            if rows.start == first:
                filled = memory.get()
            _encode(encoder, given, layout, filled, slice(rows.start - first, rows.stop - first))
            if rows.stop == last:
                copied = torch.cuda.current_stream().record_event() if encoder.device != "cpu" else None
                storing.append(disk.submit(store, number, filled, copied))
            while storing and (storing[0].done() or len(storing) == _SHARDS):
                storing.popleft().result()
        for one in storing:
            one.result()


def make_layout(images: xr.Dataset, spec: Spec, pyramid: Pyramid, input_size: int, extract: Extract) -> Layout:
    """The store's layout; classification sets keep pooled vectors alone unless dense levels are asked for."""
    dense = extract.dense or images.attrs["task"] == "segmentation"
    levels = [
        Level(*level.shape[1:], stride=input_size // level.shape[-1], layer=layer)
        for level, layer in zip(pyramid.levels, spec.layers, strict=True)
    ]
    return Layout(
        sample=tuple(images.sample.values.tolist()),
        split=tuple(images.split.values.tolist()),
        levels=tuple(levels) if dense else (),
        pooled={name: vector.shape[1] for name, vector in pyramid.pooled.items()},
        dtype=extract.dtype,
        shard=extract.shard,
        codec=codecs.parse(extract.codec, extract.dtype),
        views=extract.views if len(extract.views) > 1 else (),
    )


def provenance(images: xr.Dataset, name: str, backbone: Backbone, spec: Spec, given: Inputs, weights: Mapping,
               extract: Extract, device: str) -> dict:  # fmt: skip
    """What the store says of itself: everything that decides its content, and no timestamp."""
    return {
        "backbone": name,
        "family": backbone.family,
        "variant": backbone.variant,
        "weights": dict(weights),
        "bands": [images.band.values.tolist()[place] for place in given.seen.positions],
        "network_bands": list(given.seen.slots),
        "wavelengths_micrometre": list(given.seen.wavelengths),
        "normalisation": {
            "eats": spec.eats,
            "images_units": images.attrs["units"],
            "display": given.display,
            "of": given.normalisation,
            "mean": given.mean,
            "std": given.std,
        },
        "place_and_time": list(given.context) or False,
        "input_size": backbone.input_size,
        "resampling": spec.resize,
        "precision": extract.precision,
        "device": device,
        "task": images.attrs["task"],
        "classes": images.attrs["classes"],
        "images_sha256": images.attrs["content_sha256"],
        "licence": images.attrs["licence"],
    }


def _batches(images: xr.Dataset, encoder: Encoder, writer: Writer, batch: int) -> Iterator:
    """(shard, rows, given): the next images as the device wants them, a tensor a view, and their context."""
    pin = encoder.device != "cpu"
    seen = [views.VIEWS[view] for view in writer.layout.views] or [lambda image: image]
    for number in writer.shards():
        rows = writer.layout.rows(number)
        for start in range(rows.start, rows.stop, batch):
            chosen = slice(start, min(start + batch, rows.stop))
            image = encoder.inputs.select(images.image[chosen].values)
            tensors = [torch.from_numpy(np.ascontiguousarray(view(image))) for view in seen]
            known = {
                name: torch.from_numpy(each) for name, each in encoder.inputs.where_and_when(images, chosen).items()
            }
            if pin:
                tensors = [tensor.pin_memory() for tensor in tensors]
                known = {name: tensor.pin_memory() for name, tensor in known.items()}
            yield number, chosen, (tensors, known)


def _encode(encoder: Encoder, given, layout: Layout, filled: dict, rows: slice) -> None:
    """Encode a batch into rows of a shard's arrays; with views each array is (sample, view, …)."""
    tensors, known = given
    known = {name: tensor.to(encoder.device, non_blocking=True) for name, tensor in known.items()}
    for view, tensor in enumerate(tensors):
        pyramid = encoder.forward(encoder.inputs.tensor(tensor.to(encoder.device, non_blocking=True)), known)
        for name, values in _kept(pyramid, layout).items():
            if name not in filled:
                shape = (min(layout.shard, len(layout.sample)), *layout.shapes()[name])
                filled[name] = torch.empty(shape, pin_memory=encoder.device != "cpu")
            place = filled[name][rows, view] if layout.views else filled[name][rows]
            place.copy_(values, non_blocking=True)


def _kept(pyramid: Pyramid, layout: Layout) -> dict:
    arrays = {f"pooled/{name}": vector for name, vector in pyramid.pooled.items()}
    if layout.levels:
        arrays |= {f"level{index}/features": level for index, level in enumerate(pyramid.levels)}
    return arrays


def _ahead(items: Iterator, device: str) -> Iterator:
    """The same items, each made by a thread while those before are used."""
    end = object()
    # A thread begins at the first GPU, whichever its process uses.
    own = {} if device == "cpu" else {"initializer": torch.cuda.set_device, "initargs": (device,)}
    with ThreadPoolExecutor(1, **own) as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(_BATCHES))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item
