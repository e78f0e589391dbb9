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
from cache.schema import CONTRACT, level_array, pooled_array, scale_array

# Files that contain rows.
_SHARD_FILE = re.compile(r"(level\d+/(features|scale)|pooled/[^/]+)/c\.")
# Attributes that the content digest excludes.
_NOT_CONTENT = ("complete", "coordinates", "measurements")


def verify(path: Path) -> str:
    """Check a whole store.

    Returns:
        A summary of the store.

    Raises:
        StoreError: names the first damaged file, or a part of the contract that the store lacks.
    """
    if not path.is_dir():
        raise StoreError(f"There is no store at {path}. Copy a remote store to a folder first.", path=path)
    digests = checksums.check(path)
    try:
        root = zarr.open_group(path, mode="r")
        if (reason := root.attrs.get("skipped")) and root.attrs.get("complete"):
            return f"{path}: empty and whole ({len(digests)} files): {reason}"
        features = FeatureStore(path)
        dtype = features.attributes["dtype"]
        codec = parse_codec(features.attributes["codec"], dtype)
        for level in features.levels:
            _check_level(features, level, codec)
        for name in features.pooled:
            _check_array(features, pooled_array(name), (f"{name}_channel",), dtype)
            features.array(pooled_array(name)).check()
        _check_content(features, digests)
        return _summarize(features, digests)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"{path} does not follow contract {CONTRACT}: {type(error).__name__}: {error}. Extract it again.",
            path=path,
        ) from None


def _check_level(features: FeatureStore, level: str, codec: Codec) -> None:
    dtype, name = features.attributes["dtype"], level_array(level)
    _check_array(features, name, ("channel", "y", "x"), codec.stored_dtype(dtype))
    compressor = codec.compressor()
    expected = () if compressor is None else (_with_typesize(compressor, dtype),)
    if features.root[name].compressors != expected:
        raise StoreError(
            f"{name} is compressed in another way than codec '{codec.label}', which the attributes state.",
            key=name,
            value=features.root[name].compressors,
            allowed=expected,
            path=features.location,
        )
    if codec.has_scale:
        _check_array(features, scale_array(name), ("channel",), "float32")
    channels, height, width = features.array(name).shape
    for array_name, length, dim in (
        ("mean", channels, "channel"),
        ("std", channels, "channel"),
        ("y", height, "y"),
        ("x", width, "x"),
    ):
        array = features.root[f"{level}/{array_name}"]
        if array.shape != (length,) or array.dtype != "float64" or array.metadata.dimension_names != (dim,):
            raise StoreError(
                f"{level}/{array_name} is {array.dtype} {array.shape}; the contract requires float64 ({length},).",
                key=f"{level}/{array_name}",
                value=array.shape,
                allowed=[(length,)],
                path=features.location,
            )
    if (stated := features.root[level].attrs["channels"]) != channels:
        raise StoreError(
            f"{level} has {channels} channels, and its attribute 'channels' is {stated}.",
            key=f"{level}.channels",
            value=stated,
            allowed=[channels],
            path=features.location,
        )
    features.array(name).check()


def _check_array(features: FeatureStore, name: str, dims: tuple[str, ...], dtype: str) -> None:
    """Check dimensions, dtype and length of an array with a row for every sample."""
    array, n_views = features.root[name], len(features.view)
    expected = ("sample", *(["view"] if n_views else []), *dims)
    if array.metadata.dimension_names != expected or array.dtype != dtype:
        raise StoreError(
            f"{name} is {array.dtype} {array.metadata.dimension_names}; the contract requires {dtype} {expected}.",
            key=name,
            value=(str(array.dtype), array.metadata.dimension_names),
            allowed=[(dtype, expected)],
            path=features.location,
        )
    leading = (len(features.sample), *([n_views] if n_views else []))
    if array.shape[: len(leading)] != leading or len(features.split) != len(features.sample):
        raise StoreError(
            f"{name} has the shape {array.shape}; the store has {leading} samples (and views).",
            key=name,
            value=array.shape[: len(leading)],
            allowed=[leading],
            path=features.location,
        )


def _check_content(features: FeatureStore, digests: dict[str, str]) -> None:
    attributes = dict(features.attributes)
    expected = attributes.pop("content_sha256")
    for name in _NOT_CONTENT:
        attributes.pop(name, None)
    shards = {file: digest for file, digest in digests.items() if _SHARD_FILE.match(file)}
    if (actual := checksums.content_digest(attributes, shards)) != expected:
        raise StoreError(
            f"The attributes or shards of {features.location} do not match its content_sha256. Extract it again.",
            key="content_sha256",
            value=expected,
            allowed=[actual],
            path=features.location,
        )


def _with_typesize(compressor: BloscCodec, dtype: str) -> BloscCodec:
    """The compressor as zarr stores it, with the bytes of a value."""
    return BloscCodec(
        typesize=np.dtype(dtype).itemsize,
        cname=compressor.cname,
        clevel=compressor.clevel,
        shuffle=compressor.shuffle,
    )


def _summarize(features: FeatureStore, digests: dict[str, str]) -> str:
    sizes = [(Path(features.location) / file).stat().st_size for file in digests]
    gigabytes = sum(sizes) / 1e9
    attributes = features.attributes
    counts = dict(zip(*np.unique(features.split, return_counts=True), strict=True))
    lines = [
        f"{features.location}: whole ({len(digests)} files, {gigabytes:.3f} GB), contract {attributes['contract']}",
        f"samples   {len(features.sample)}: " + ", ".join(f"{name} {count}" for name, count in counts.items()),
    ]
    if features.view:
        lines.append(f"views     {', '.join(features.view)}")
    for level in features.levels:
        group = features.root[level]
        shape = "x".join(map(str, features.array(level_array(level)).shape))
        lines.append(
            f"{level}    {shape}, stride {group.attrs['stride']}, stored with relative error "
            f"{group.attrs['relative_error']:.2g} ({group.attrs['layer']})"
        )
    lines.append(f"pooled    {', '.join(features.pooled)}")
    lines.append(f"stored as {attributes['dtype']}, codec {attributes['codec']}")
    for name in ("backbone", "weights", "bands", "input_size", "images_sha256", "measurements", "content_sha256"):
        if name in attributes:
            lines.append(f"{name}: {attributes[name]}")
    return "\n".join(lines)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m cache.verify", description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    try:
        print(verify(parser.parse_args().path))
    except StoreError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
