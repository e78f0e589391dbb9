"""The contract of cache/README.md in code: names and shapes of arrays, and an empty store."""

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cache.codecs import NONE, Codec
from cache.errors import StoreError

if TYPE_CHECKING:
    import zarr

CONTRACT = "3"
DTYPES = ("float16", "float32")
# Shard files are directly in their array's folder, so that one flush of that folder makes their names durable.
CHUNK_KEYS = {"name": "default", "separator": "."}


def level_array(level: int | str) -> str:
    """Return the path in a store of the features of a level, given its number, 0 the finest, or its name."""
    return f"{level}/features" if isinstance(level, str) else f"level{level}/features"


def pooled_array(name: str) -> str:
    """Return the path in a store of a pooled vector, such as `pooled/mean_level3`."""
    return f"pooled/{name}"


def is_level_array(path: str) -> bool:
    """Return whether a path is that of a level's features."""
    return path.endswith("/features")


def layer_name(path: str) -> str:
    """Return the name of the level or pooled vector at a path: `level0`, or `mean_level3`."""
    return path.removeprefix("pooled/").removesuffix("/features")


def scale_array(path: str) -> str:
    """Return the path of the int8 scale of the level's features at `path`."""
    return path.removesuffix("features") + "scale"


@dataclass(frozen=True)
class LevelSchema:
    """A level of a feature pyramid: shape of a sample, input pixels per cell, layer of the backbone."""

    channels: int
    height: int
    width: int
    stride: int
    layer: str


@dataclass(frozen=True)
class StoreSchema:
    """Names, shapes, dtype and codec of the arrays of a feature store.

    Attributes:
        sample: name of each sample, equal to the images store's.
        split: split of each sample, equal to the images store's.
        levels: finest first; may be empty.
        pooled: number of channels of each pooled vector by name, such as `mean_level3`.
        dtype: of the features when read, one of `DTYPES`.
        shard_size: samples per file; the unit of work and of resumption.
        codec: storage format of the levels; pooled vectors are small and stored uncompressed.
        views: names of the augmented copies of each sample; empty for a store without that dimension.

    Raises StoreError if a field is invalid; `key` names it.
    """

    sample: tuple[str, ...]
    split: tuple[str, ...]
    levels: tuple[LevelSchema, ...]
    pooled: dict[str, int]
    dtype: str
    shard_size: int
    codec: Codec = NONE
    views: tuple[str, ...] = ()

    def __post_init__(self):
        for key in ("sample", "split", "views"):
            counts = Counter(getattr(self, key))
            if "" in counts:
                raise StoreError(f"{key} has an empty entry; give each one a name.", key=key, value="")
            for name, count in counts.most_common(1):
                if count > 1 and key != "split":
                    raise StoreError(f"{key} has '{name}' more than once; names must differ.", key=key, value=name)
        if not self.sample or len(self.split) != len(self.sample):
            raise StoreError(
                f"There are {len(self.sample)} samples and {len(self.split)} splits. Give at least one sample, and a "
                "split for each.",
                key="split", value=len(self.split),
            )  # fmt: skip
        if self.dtype not in DTYPES:
            raise StoreError(
                f"dtype is '{self.dtype}'; features are stored as {' or '.join(DTYPES)}.",
                key="dtype", value=self.dtype, allowed=DTYPES,
            )  # fmt: skip
        for key, shape in {"shard_size": (self.shard_size,), **self.shapes()}.items():
            if min(shape) < 1:
                raise StoreError(f"{key} has the size {min(shape)}; at least 1.", key=key, value=min(shape))

    @property
    def n_shards(self) -> int:
        return -(-len(self.sample) // self.shard_size)

    @property
    def attributes(self) -> dict[str, str]:
        """Attributes of the store's root group."""
        return {"contract": CONTRACT, "dtype": self.dtype, "codec": self.codec.name}

    def rows(self, shard: int) -> slice:
        return slice(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.sample)))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of one sample, including views, of each array that a writer takes."""
        views = (len(self.views),) if self.views else ()
        shapes = {
            level_array(index): (*views, level.channels, level.height, level.width)
            for index, level in enumerate(self.levels)
        }
        return shapes | {pooled_array(name): (*views, channels) for name, channels in self.pooled.items()}


def create_store(path: Path, schema: StoreSchema) -> None:
    """Create the groups and the empty arrays of a store."""
    # zarr takes 0.25 s to import, and worker processes that read raw files import this module without needing it.
    import zarr

    root = zarr.open_group(path, mode="w", zarr_format=3)
    root.attrs.update(schema.attributes)
    for name in ("sample", "split"):
        put_array(root, name, np.array(getattr(schema, name), dtype=object), ("sample",))
    view = ("view",) if schema.views else ()
    if schema.views:
        put_array(root, "view", np.array(schema.views, dtype=object), view)
    n_samples, shard_size = len(schema.sample), min(schema.shard_size, len(schema.sample))
    shapes = schema.shapes()
    for index, level in enumerate(schema.levels):
        attributes = {"stride": level.stride, "channels": level.channels, "layer": level.layer}
        group = root.create_group(f"level{index}", attributes=attributes)
        shape = shapes[level_array(index)]
        # A chunk is one map, so that a minibatch reads only what it needs; a file is one shard.
        _create_empty(
            group, "features", (n_samples, *shape), schema.codec.stored_dtype(schema.dtype),
            ("sample", *view, "channel", "y", "x"),
            chunks=(*[1] * (1 + len(view)), level.channels, level.height, level.width),
            shards=(shard_size, *shape), compressors=schema.codec.compressor(schema.dtype),
        )  # fmt: skip
        if schema.codec.has_scale:
            _create_empty(
                group, "scale", (n_samples, *shape[:-2]), "float32",
                ("sample", *view, "channel"), (shard_size, *shape[:-2]),
            )  # fmt: skip
        for axis, n_cells in (("y", level.height), ("x", level.width)):
            centers = (np.arange(n_cells) + 0.5) * level.stride
            put_array(group, axis, centers, (axis,), attributes={"units": "input pixels, at the center of the cell"})
    group = root.create_group("pooled", attributes={"vectors": list(schema.pooled)})
    for name in schema.pooled:
        shape = shapes[pooled_array(name)]
        _create_empty(
            group, name, (n_samples, *shape), schema.dtype, ("sample", *view, f"{name}_channel"), (shard_size, *shape)
        )


def put_array(group: "zarr.Group", name: str, values, dims, *, chunks=None, attributes=None) -> None:
    """Write a whole array with named dimensions, uncompressed, by default as one chunk.

    An object array becomes text. The file is written even if all is zero, so that a missing file is always an error.
    """
    values = np.asarray(values)
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=str if values.dtype == object else values.dtype,
        chunks=chunks or tuple(max(1, side) for side in values.shape),
        compressors=None,
        dimension_names=dims,
        attributes=attributes or {},
        config={"write_empty_chunks": True},
    )
    array[...] = values


def consolidate_metadata(group: "zarr.Group") -> None:
    """Copy all metadata to the zarr.json of the root, so that xarray opens the store with one read."""
    # zarr takes 0.25 s to import, and worker processes that read raw files import this module without needing it.
    import zarr
    from zarr.errors import ZarrUserWarning

    with warnings.catch_warnings():
        # zarr-python warns that other readers may ignore consolidated metadata, which does no harm.
        warnings.filterwarnings("ignore", category=ZarrUserWarning, message="Consolidated metadata")
        zarr.consolidate_metadata(group.store)


def _create_empty(group, name, shape, dtype, dims, chunks, shards=None, compressors=None) -> None:
    """Create an array whose unwritten values are NaN, or 0 for int8, which has no NaN."""
    group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        shards=shards,
        compressors=compressors,
        fill_value=0 if dtype == "int8" else float("nan"),
        dimension_names=dims,
        chunk_key_encoding=CHUNK_KEYS,
    )
