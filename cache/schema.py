"""The written contract of a feature store in code: names, layout, and how an array is laid down."""

from pathlib import Path

import numpy as np
import zarr

CONTRACT = "1"
DTYPES = ("float16", "float32")


class StoreError(Exception):
    """A store that is absent, unfinished or not what its reader needs. The message says what to do."""


def put_array(group, name, values, dims, *, chunks=None, attributes=None) -> None:
    """Write a whole array with named dimensions, uncompressed."""
    values = np.asarray(values)
    text = values.dtype == object
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=str if text else values.dtype,
        chunks=chunks or tuple(max(1, side) for side in values.shape),
        compressors=None,
        dimension_names=dims,
        attributes=attributes or {},
    )
    array[...] = values


def create_features(group, name, shape, dtype, dims, shard, attributes) -> None:
    """An empty features array at full size: a chunk a sample, a file for `shard` samples, NaN where unwritten."""
    count, rest = shape[0], tuple(shape[1:])
    group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(1, *rest),
        shards=(min(shard, count), *rest),
        compressors=None,
        fill_value=float("nan"),
        dimension_names=dims,
        attributes=attributes,
        config={"write_empty_chunks": True},
    )


def is_finished(path: Path) -> bool:
    """Whether `path` is a store that its writer completed."""
    try:
        return bool(zarr.open_group(path, mode="r").attrs.get("complete"))
    except (FileNotFoundError, ValueError):
        return False
