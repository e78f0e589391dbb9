"""The contract of cache/README.md in code: names, layout, and how an array is laid down.

zarr, which takes a quarter of a second to import, is imported by what needs it: processes that only read raw files do
not wait for it.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cache.codecs import NONE, Codec
from cache.errors import StoreError

if TYPE_CHECKING:
    import zarr

CONTRACT = "2"
DTYPES = ("float16", "float32")
# A shard file lies right in its array's folder, so that one flush of that folder makes its name durable.
CHUNK_KEYS = {"name": "default", "separator": "."}


def level_array(index: int) -> str:
    """Path of the features of one level in a store; level 0 is the finest."""
    return f"level{index}/features"


def pooled_array(name: str) -> str:
    """Path of one pooled vector in a store, such as `pooled/mean_level3`."""
    return f"pooled/{name}"


@dataclass(frozen=True)
class LevelSchema:
    """One level of a pyramid: what a sample's features are and where in the backbone they come from.

    Attributes:
        channels, height, width: of one sample's features.
        stride: input pixels per feature cell.
        layer: the source layer in the backbone's own words.
    """

    channels: int
    height: int
    width: int
    stride: int
    layer: str


@dataclass(frozen=True)
class StoreSchema:
    """Everything that decides which arrays a feature store has.

    Attributes:
        sample, split: one string per sample, equal to the images store's.
        levels: finest first; may be empty.
        pooled: channels of each pooled vector by name, such as `mean_level3`.
        dtype: of the features as a reader gets them, one of `DTYPES`.
        shard: samples per file; the unit of work and of resumption.
        codec: how levels are stored; pooled vectors are small and always stored as they are.
        views: names of the augmented copies of each sample; empty for a store without that dimension.

    Raises:
        StoreError: fields that do not make a store.
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
        for what in ("sample", "views"):
            names = getattr(self, what)
            if len(set(names)) < len(names):
                twice = next(name for number, name in enumerate(names) if name in names[:number])
                raise StoreError(f"{what} has '{twice}' more than once; every name must be its own.")
        if not self.sample or len(self.split) != len(self.sample):
            raise StoreError(f"There are {len(self.sample)} samples and {len(self.split)} splits; each needs one.")
        if "" in (*self.sample, *self.split):
            raise StoreError("A sample's name, or its split, is empty; each needs one.")
        if self.dtype not in DTYPES:
            raise StoreError(f"dtype is '{self.dtype}'; features are stored as {' or '.join(DTYPES)}.")
        sizes = [self.shard_size, *self.pooled.values()]
        sizes += [size for level in self.levels for size in (level.channels, level.height, level.width)]
        if min(sizes) < 1:
            raise StoreError(f"Shard, channels and cells must be at least 1; there are {sizes}.")

    @property
    def n_shards(self) -> int:
        return -(-len(self.sample) // self.shard_size)

    def rows(self, shard: int) -> slice:
        """The samples of a shard."""
        return slice(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.sample)))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """One sample's shape, with its views, by the path of each array that a writer is given."""
        views = (len(self.views),) if self.views else ()
        shapes = {
            level_array(index): (*views, level.channels, level.height, level.width)
            for index, level in enumerate(self.levels)
        }
        return shapes | {pooled_array(name): (*views, channels) for name, channels in self.pooled.items()}

    def array_names(self) -> list[str]:
        """Paths of the arrays that a writer is given."""
        return list(self.shapes())


def create_store(path: Path, layout: StoreSchema) -> None:
    """Lay down the groups and empty arrays of a store that is yet to be filled."""
    import zarr

    root = zarr.open_group(path, mode="w", zarr_format=3)
    root.attrs.update({"contract": CONTRACT, "dtype": layout.dtype, "codec": layout.codec.label})
    for name in ("sample", "split"):
        put_array(root, name, np.array(getattr(layout, name), dtype=object), ("sample",))
    view = ("view",) if layout.views else ()
    if layout.views:
        put_array(root, "view", np.array(layout.views, dtype=object), view)
    count, shard = len(layout.sample), min(layout.shard_size, len(layout.sample))
    shapes = layout.shapes()
    for index, level in enumerate(layout.levels):
        group = root.create_group(
            f"level{index}",
            attributes={"stride": level.stride, "channels": level.channels, "layer": level.layer},
        )
        shape = shapes[level_array(index)]
        # One map a chunk, so that a minibatch reads what it needs; one file a shard.
        _create_empty(
            group, "features", (count, *shape), layout.codec.stored_dtype(layout.dtype),
            ("sample", *view, "channel", "y", "x"),
            chunks=(*[1] * (1 + len(view)), level.channels, level.height, level.width),
            shards=(shard, *shape), compressors=layout.codec.compressor(),
        )  # fmt: skip
        if layout.codec.has_scale:
            _create_empty(
                group, "scale", (count, *shape[:-2]), "float32", ("sample", *view, "channel"), (shard, *shape[:-2])
            )
        for side, cells in (("y", level.height), ("x", level.width)):
            centres = (np.arange(cells) + 0.5) * level.stride
            put_array(group, side, centres, (side,), attributes={"units": "input pixels, at the cell's centre"})
    group = root.create_group("pooled", attributes={"vectors": list(layout.pooled)})
    for name in layout.pooled:
        shape = shapes[pooled_array(name)]
        _create_empty(
            group, name, (count, *shape), layout.dtype, ("sample", *view, f"{name}_channel"), (shard, *shape)
        )


def put_array(group: "zarr.Group", name: str, values, dims, *, chunks=None, attributes=None) -> None:
    """Write a whole array with named dimensions, uncompressed; an object array is written as text.

    Its file is there also if all values are zero: else nobody could tell that from a file that was lost.
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
    """Gather all metadata in the root's zarr.json, so that xarray opens the store with one read."""
    import zarr
    from zarr.errors import ZarrUserWarning

    with warnings.catch_warnings():
        # Readers that do not know consolidated metadata ignore it; zarr-python warns that they may.
        warnings.filterwarnings("ignore", category=ZarrUserWarning, message="Consolidated metadata")
        zarr.consolidate_metadata(group.store)


def _create_empty(group, name, shape, dtype, dims, chunks, shards=None, compressors=None) -> None:
    """NaN where unwritten (0 for int8, which has none)."""
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
