"""The extraction engine: one pass of one frozen backbone over one images store, shard by shard."""

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xarray as xr
from tqdm import tqdm

from cache import codecs, prepare, schema, shard, statistics, write
from cache.schema import Layout, Level
from cache.write import Writer
from pipeline import bands, encode, views
from pipeline.archives import digest
from pipeline.encode import Encoder
from pipeline.params import Backbone, Extract
from pipeline.pyramid import Pyramid, Spec


def scratch_path(folder: Path, described: Mapping, extract: Extract) -> Path:
    """The place in `folder` of one extraction before it is published, named by everything that decides its bytes.

    The same inputs resume there after a kill; other inputs or other code start afresh, and what an earlier
    extraction of other inputs left in `folder` is removed.
    """
    modules = (bands, encode, views, schema, codecs, prepare, shard, statistics, write)
    code = [digest(Path(file)) for file in (__file__, *[module.__file__ for module in modules])]
    decides = {**described, "code": code, "extract": dataclasses.asdict(extract)}
    path = folder / hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    for old in folder.glob("[!.]*"):
        if old != path:
            shutil.rmtree(old, ignore_errors=True)
    return path


def extract(images: xr.Dataset, encoder: Encoder, layout_of, writer_of, batch: int) -> Writer:
    """Encode every sample once and write what the layout keeps.

    Args:
        layout_of: from a first sample's pyramid to the store's layout.
        writer_of: from the layout to a writer, which may have shards from an earlier run.
        batch: images per forward.

    Returns:
        The writer, with nothing pending.
    """
    layout = layout_of(encoder(images.image[:1].values))
    writer = writer_of(layout)
    count = len(layout.sample)
    done = count - sum(layout.rows(number).stop - layout.rows(number).start for number in writer.pending())
    with tqdm(total=count, initial=done, unit="image", mininterval=2, file=sys.stderr) as progress:
        for number in writer.shards():
            rows = layout.rows(number)
            starts = range(rows.start, rows.stop, batch)
            parts = [
                _views(encoder, images.image[start : min(start + batch, rows.stop)].values, layout)
                for start in starts
            ]
            writer.write(number, {name: np.concatenate([part[name] for part in parts]) for name in layout.arrays()})
            progress.update(rows.stop - rows.start)
    return writer


def make_layout(images: xr.Dataset, spec: Spec, pyramid: Pyramid, extract: Extract) -> Layout:
    """The store's layout; classification sets keep pooled vectors alone unless dense levels are asked for."""
    dense = extract.dense or images.attrs["task"] == "segmentation"
    levels = [
        Level(*level.shape[1:], stride=stride, layer=layer)
        for level, stride, layer in zip(pyramid.levels, spec.strides, spec.layers, strict=True)
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


def provenance(images: xr.Dataset, name: str, backbone: Backbone, spec: Spec, weights: Mapping, device: str) -> dict:
    """What the store says of itself: everything that decides its content, and no timestamp."""
    return {
        "backbone": name,
        "family": backbone.family,
        "variant": backbone.variant,
        "weights": dict(weights),
        "bands": list(spec.bands or images.band.values.tolist()),
        "normalisation": {
            "eats": spec.eats,
            "images_units": images.attrs["units"],
            "display": images.attrs["display"] if spec.eats == "display" else None,
            "mean": spec.mean,
            "std": spec.std,
        },
        "input_size": backbone.input_size,
        "resampling": spec.resize,
        "precision": "float32",
        "device": device,
        "task": images.attrs["task"],
        "classes": images.attrs["classes"],
        "images_sha256": images.attrs["content_sha256"],
        "licence": images.attrs["licence"],
    }


def _views(encoder: Encoder, image: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """What is kept of a batch; in a store with views each array (batch, view, …)."""
    if not layout.views:
        return _kept(encoder(image), layout)
    seen = [_kept(encoder(views.VIEWS[view](image)), layout) for view in layout.views]
    return {name: np.stack([one[name] for one in seen], axis=1) for name in layout.arrays()}


def _kept(pyramid: Pyramid, layout: Layout) -> dict[str, np.ndarray]:
    arrays = {f"pooled/{name}": vector for name, vector in pyramid.pooled.items()}
    if layout.levels:
        arrays |= {f"level{index}/features": level for index, level in enumerate(pyramid.levels)}
    return arrays
