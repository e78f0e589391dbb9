"""Check a feature store: contract, completeness and every checksum.

python -m cache.verify PATH
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import zarr

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
    """Check a whole store, and return a summary of it.

    Raises StoreError with the first damaged file, or with a part of the contract that the store lacks.
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
    compressors = (compressor,) if (compressor := codec.compressor(dtype)) else ()
    _check(features, name, features.root[name].compressors, compressors)
    if codec.has_scale:
        _check_array(features, scale_array(name), ("channel",), "float32")
    channels, height, width = features.array(name).shape
    sizes = {"mean": ("channel", channels), "std": ("channel", channels), "y": ("y", height), "x": ("x", width)}
    for key, (dim, length) in sizes.items():
        array = features.root[f"{level}/{key}"]
        actual = array.shape, str(array.dtype), array.metadata.dimension_names
        _check(features, f"{level}/{key}", actual, ((length,), "float64", (dim,)))
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
    _check(features, "content_sha256", expected, checksums.fingerprint(attributes, shards))


def _summarize(features: FeatureStore, digests: dict[str, str]) -> str:
    folder = Path(features.location)
    gigabytes = sum([(folder / file).stat().st_size for file in digests]) / 1e9
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
