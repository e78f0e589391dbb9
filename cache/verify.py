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
        codec = parse_codec(features.attributes["codec"])
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


def _check(features: FeatureStore, key: str, actual: object, expected: object) -> None:
    if actual != expected:
        raise StoreError(
            f"{key} of {features.location} is {actual}; the contract requires {expected}. Extract it again.",
            key=key, value=actual, allowed=[expected], path=features.location,
        )  # fmt: skip


def _check_level(features: FeatureStore, level: str, codec: Codec) -> None:
    dtype, name = features.attributes["dtype"], level_array(level)
    _check_array(features, name, ("channel", "y", "x"), codec.stored_dtype(dtype))
    compressor = codec.compressor()
    expected = () if compressor is None else (_with_typesize(compressor, dtype),)
    _check(features, name, features.root[name].compressors, expected)
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
        actual = array.shape, str(array.dtype), array.metadata.dimension_names
        _check(features, f"{level}/{array_name}", actual, ((length,), "float64", (dim,)))
    _check(features, f"{level}.channels", features.root[level].attrs["channels"], channels)
    features.array(name).check()


def _check_array(features: FeatureStore, name: str, dims: tuple[str, ...], dtype: str) -> None:
    """Check dimensions, dtype and length of an array with a row for every sample."""
    array, views = features.root[name], ["view"] if features.view else []
    actual = str(array.dtype), array.metadata.dimension_names
    _check(features, name, actual, (dtype, ("sample", *views, *dims)))
    leading = (len(features.sample), *([len(features.view)] if views else []))
    _check(features, name, array.shape[: len(leading)], leading)
    _check(features, "split", len(features.split), len(features.sample))


def _check_content(features: FeatureStore, digests: dict[str, str]) -> None:
    attributes = {key: value for key, value in features.attributes.items() if key not in _NOT_CONTENT}
    expected = attributes.pop("content_sha256")
    shards = {file: digest for file, digest in digests.items() if _SHARD_FILE.match(file)}
    _check(features, "content_sha256", expected, checksums.content_digest(attributes, shards))


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
