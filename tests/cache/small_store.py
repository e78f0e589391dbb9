"""A small layout and values for it, for tests that are about bytes and not about what they mean."""

import numpy as np

from cache.codecs import parse_codec
from cache.schema import LevelSchema, StoreSchema
from cache.writer import Writer

SAMPLES = 150


def layout(dtype="float16", samples=SAMPLES, shard=64, codec="none", views=()):
    return StoreSchema(
        sample=tuple(f"s{i:03d}" for i in range(samples)),
        split=tuple("train" if i % 3 else "test" for i in range(samples)),
        levels=(LevelSchema(5, 8, 8, 4, "a"), LevelSchema(7, 4, 4, 8, "b")),
        pooled={"mean_level0": 5, "mean_level1": 7},
        dtype=dtype,
        shard_size=shard,
        codec=parse_codec(codec, dtype),
        views=views,
    )


def values(described, shard, seed=0):
    rows = described.rows(shard)
    generator = np.random.default_rng([seed, shard])
    return {
        name: generator.normal(size=(rows.stop - rows.start, *shape)).astype("float32")
        for name, shape in described.shapes().items()
    }


def everything(described, name, seed=0):
    return np.concatenate([values(described, shard, seed)[name] for shard in range(described.n_shards)])


def write(folder, described=None, stop_after=None, seed=0, given=values):
    """The digest of `folder`/store.zarr, or None if the writer stopped after so many shards."""
    described = described or layout()
    writer = Writer(folder / "scratch", described, folder / "store.zarr", {"backbone": "b"})
    for done, shard in enumerate(writer.claim_shards()):
        if done == stop_after:
            return None
        writer.write(shard, given(described, shard, seed))
    return writer.finish()


def content(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
