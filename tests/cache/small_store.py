"""A small store with random values, for tests of bytes."""

import numpy as np

from cache.codecs import parse_codec
from cache.reader import FeatureStore
from cache.schema import LevelSchema, StoreSchema
from cache.writer import Writer

N_SAMPLES = 150


def small_schema(dtype="float16", samples=N_SAMPLES, shard_size=64, codec="none", views=()):
    return StoreSchema(
        sample=tuple(f"s{i:03d}" for i in range(samples)),
        split=tuple("train" if i % 3 else "test" for i in range(samples)),
        levels=(LevelSchema(5, 8, 8, 4, "a"), LevelSchema(7, 4, 4, 8, "b")),
        pooled={"mean_level0": 5, "mean_level1": 7},
        dtype=dtype,
        shard_size=shard_size,
        codec=parse_codec(codec),
        views=views,
    )


def shard_values(schema, shard, seed=0):
    """Random float32 values of one shard of every array."""
    rows = schema.rows(shard)
    generator = np.random.default_rng([seed, shard])
    return {
        name: generator.normal(size=(rows.stop - rows.start, *shape)).astype("float32")
        for name, shape in schema.shapes().items()
    }


def all_values(schema, name, seed=0):
    """The float32 values of a whole array."""
    return np.concatenate([shard_values(schema, shard, seed)[name] for shard in range(schema.n_shards)])


def write_store(folder, schema=None, stop_after=None, seed=0, make_values=shard_values):
    """Write `folder`/store.zarr; returns its digest, or None if the writer stopped after so many shards."""
    schema = schema or small_schema()
    writer = Writer(folder / "scratch", schema, folder / "store.zarr", {"backbone": "b"})
    for n_written, shard in enumerate(writer.claim_shards()):
        if n_written == stop_after:
            return None
        writer.write(shard, make_values(schema, shard, seed))
    return writer.finish()


def open_store(folder, schema=None, **arguments):
    """Write `folder`/store.zarr with `write_store`, and open it."""
    write_store(folder, schema, **arguments)
    return FeatureStore(folder / "store.zarr")


def file_bytes(path):
    """Content of every file below a folder, by relative path."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
