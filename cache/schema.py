"""The contract of cache/README.md in code: names, layout, and how an array is laid down."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr
from zarr.errors import ZarrUserWarning

CONTRACT = "1"
DTYPES = ("float16", "float32")


class StoreError(Exception):
    """A store that is absent, unfinished or not what its reader needs. The message says what to do."""


@dataclass(frozen=True)
class Level:
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
class Layout:
    """Everything that decides which arrays a feature store has.

    Attributes:
        sample, split: one string per sample, equal to the images store's.
        levels: finest first; may be empty.
        pooled: channels of each pooled vector by name, such as `mean_level3`.
        dtype: of the features, one of `DTYPES`.
        shard: samples per file; the unit of work and of resumption.
    """

    sample: tuple[str, ...]
    split: tuple[str, ...]
    levels: tuple[Level, ...]
    pooled: dict[str, int]
    dtype: str
    shard: int

    @property
    def shards(self) -> int:
        return -(-len(self.sample) // self.shard)

    def rows(self, shard: int) -> slice:
        """The samples of a shard."""
        return slice(shard * self.shard, min((shard + 1) * self.shard, len(self.sample)))

    def arrays(self) -> list[str]:
        """Paths of the arrays that shards are written to."""
        levels = [f"level{index}/features" for index in range(len(self.levels))]
        return levels + [f"pooled/{name}" for name in self.pooled]


def create(path: Path, layout: Layout) -> None:
    """Lay down the groups and empty arrays of a store that is yet to be filled."""
    root = zarr.open_group(path, mode="w", zarr_format=3)
    put_array(root, "sample", np.array(layout.sample, dtype=object), ("sample",))
    put_array(root, "split", np.array(layout.split, dtype=object), ("sample",))
    count, shard = len(layout.sample), min(layout.shard, len(layout.sample))
    for index, level in enumerate(layout.levels):
        group = root.create_group(
            f"level{index}",
            attributes={"stride": level.stride, "channels": level.channels, "layer": level.layer},
        )
        shape = (level.channels, level.height, level.width)
        # One sample a chunk, so that a minibatch reads what it needs; one file a shard.
        _create_empty(
            group, "features", (count, *shape), layout.dtype, (1, *shape), (shard, *shape),
            ("sample", "channel", "y", "x"),
        )  # fmt: skip
    group = root.create_group("pooled", attributes={"vectors": list(layout.pooled)})
    for name, channels in layout.pooled.items():
        _create_empty(
            group,
            name,
            (count, channels),
            layout.dtype,
            (shard, channels),
            None,
            ("sample", f"{name}_channel"),
        )


def put_array(group: zarr.Group, name: str, values, dims, *, chunks=None, attributes=None) -> None:
    """Write a whole array with named dimensions, uncompressed; an object array is written as text."""
    values = np.asarray(values)
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=str if values.dtype == object else values.dtype,
        chunks=chunks or tuple(max(1, side) for side in values.shape),
        compressors=None,
        dimension_names=dims,
        attributes=attributes or {},
    )
    array[...] = values


def consolidate(group: zarr.Group) -> None:
    """Gather all metadata in the root's zarr.json, so that xarray opens the store with one read."""
    with warnings.catch_warnings():
        # Readers that do not know consolidated metadata ignore it; zarr-python warns that they may.
        warnings.filterwarnings("ignore", category=ZarrUserWarning, message="Consolidated metadata")
        zarr.consolidate_metadata(group.store)


def _create_empty(group, name, shape, dtype, chunks, shards, dims) -> None:
    """NaN where unwritten; every chunk is written, since zarr-python is slow at looking for empty ones."""
    group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        shards=shards,
        compressors=None,
        fill_value=float("nan"),
        dimension_names=dims,
        config={"write_empty_chunks": True},
    )
