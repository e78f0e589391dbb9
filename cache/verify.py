"""Check a feature store: contract, completeness and every checksum.

python -m cache.verify PATH
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import BloscCodec

from cache import checksums
from cache.codecs import Codec, parse_codec
from cache.errors import StoreError
from cache.reader import FeatureStore
from cache.schema import CONTRACT

# Files that hold rows.
_SHARD = re.compile(r"(level\d+/(features|scale)|pooled/[^/]+)/c\.")


def verify(path: Path) -> str:
    """A short account of a whole store.

    Raises:
        StoreError: naming the first file that is wrong, or what the contract asks for and is not there.
    """
    if not path.is_dir():
        raise StoreError(f"There is no store at {path}. A store that is elsewhere must be fetched first.")
    listed = checksums.check(path)
    try:
        root = zarr.open_group(path, mode="r")
        if (reason := root.attrs.get("skipped")) and root.attrs.get("complete"):
            return f"{path}: empty and whole ({len(listed)} files): {reason}"
        features = FeatureStore(path)
        codec = parse_codec(features.attributes["codec"], features.attributes["dtype"])
        for level in features.levels:
            _check_level(features, level, codec)
        for name in features.pooled:
            _check_array(features, f"pooled/{name}", (f"{name}_channel",), features.attributes["dtype"])
            features.array(f"pooled/{name}").check()
        _check_content(features, listed)
        return _account(features, listed)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path} does not follow contract {CONTRACT}: {type(error).__name__}: {error}") from None


def _check_level(features: FeatureStore, level: str, codec: Codec) -> None:
    dtype = features.attributes["dtype"]
    _check_array(features, f"{level}/features", ("channel", "y", "x"), codec.stored_dtype(dtype))
    wanted = codec.compressor()
    if features.root[f"{level}/features"].compressors != (() if wanted is None else (_evolved(wanted, dtype),)):
        raise StoreError(f"{level}/features is not compressed as codec '{codec.label}' says.")
    if codec.has_scale:
        _check_array(features, f"{level}/scale", ("channel",), "float32")
    channels, height, width = features.array(f"{level}/features").shape
    for name, length, dim in (
        ("mean", channels, "channel"),
        ("std", channels, "channel"),
        ("y", height, "y"),
        ("x", width, "x"),
    ):
        array = features.root[f"{level}/{name}"]
        if array.shape != (length,) or array.dtype != "float64" or array.metadata.dimension_names != (dim,):
            raise StoreError(
                f"{level}/{name} is {array.dtype} {array.shape}; the contract wants float64 ({length},)."
            )
    if features.root[level].attrs["channels"] != channels:
        raise StoreError(f"{level} has {channels} channels and says it has {features.root[level].attrs['channels']}.")
    features.array(f"{level}/features").check()


def _check_array(features: FeatureStore, name: str, dims: tuple[str, ...], dtype: str) -> None:
    """Dimensions, dtype and length of an array with a row for every sample."""
    array, views = features.root[name], len(features.view)
    wanted = ("sample", *(["view"] if views else []), *dims)
    if array.metadata.dimension_names != wanted or array.dtype != dtype:
        raise StoreError(
            f"{name} is {array.dtype} {array.metadata.dimension_names}; the contract wants {dtype} {wanted}."
        )
    leading = (len(features.sample), *([views] if views else []))
    if array.shape[: len(leading)] != leading or len(features.split) != len(features.sample):
        raise StoreError(f"{name} has the shape {array.shape}; the store has {leading} samples (and views).")


def _check_content(features: FeatureStore, listed: dict[str, str]) -> None:
    said = dict(features.attributes)
    digest = said.pop("content_sha256")
    for name in ("complete", "coordinates", "measured"):
        said.pop(name, None)
    shards = {file: value for file, value in listed.items() if _SHARD.match(file)}
    if checksums.content_digest(said, shards) != digest:
        raise StoreError(f"The attributes or shards of {features.location} are not those of its content_sha256.")


def _evolved(compressor: BloscCodec, dtype: str) -> BloscCodec:
    """As zarr writes it down, with the size of a value."""
    return BloscCodec(
        typesize=np.dtype(dtype).itemsize,
        cname=compressor.cname,
        clevel=compressor.clevel,
        shuffle=compressor.shuffle,
    )


def _account(features: FeatureStore, listed: dict[str, str]) -> str:
    size = sum((features.location / file).stat().st_size for file in listed)
    said, counts = features.attributes, dict(zip(*np.unique(features.split, return_counts=True), strict=True))
    lines = [
        f"{features.location}: whole ({len(listed)} files, {size / 1e9:.3f} GB), contract {said['contract']}",
        f"samples   {len(features.sample)}: " + ", ".join(f"{name} {count}" for name, count in counts.items()),
    ]
    if features.view:
        lines.append(f"views     {', '.join(features.view)}")
    for level in features.levels:
        group = features.root[level]
        shape = "x".join(map(str, features.array(f"{level}/features").shape))
        lines.append(
            f"{level}    {shape}, stride {group.attrs['stride']}, stored with relative error "
            f"{group.attrs['relative_error']:.2g} ({group.attrs['layer']})"
        )
    lines.append(f"pooled    {', '.join(features.pooled)}")
    lines.append(f"stored as {said['dtype']}, codec {said['codec']}")
    for name in ("backbone", "weights", "bands", "input_size", "images_sha256", "measured", "content_sha256"):
        if name in said:
            lines.append(f"{name}: {said[name]}")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m cache.verify", description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    try:
        print(verify(parser.parse_args().path))
    except StoreError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
