"""Check a feature store: contract, completeness and every checksum.

python -m cache.verify PATH
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import zarr

from cache import checksums
from cache.read import Features
from cache.schema import StoreError


def verify(path: Path) -> str:
    """A short account of a whole store.

    Raises:
        StoreError: naming the first file that is wrong, or what the contract asks for and is not there.
    """
    if not path.is_dir():
        raise StoreError(f"There is no store at {path}.")
    files = checksums.check(path)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    root = zarr.open_group(path, mode="r")
    if (reason := root.attrs.get("left_out")) and root.attrs.get("complete"):
        return f"{path}: empty and whole ({files} files): {reason}"
    features = Features(path)
    for level in features.levels:
        _check_array(features, root[f"{level}/features"], ("channel", "y", "x"))
    for name in features.pooled:
        _check_array(features, root[f"pooled/{name}"], (f"{name}_channel",))
    return _account(features, files, size)


def _check_array(features: Features, array: zarr.Array, dims: tuple[str, ...]) -> None:
    wanted = ("sample", *(["view"] if features.view else []), *dims)
    if array.metadata.dimension_names != wanted:
        raise StoreError(f"{array.path} has the dimensions {array.metadata.dimension_names}; wanted {wanted}.")
    leading = (len(features.sample), len(features.view))[: 2 if features.view else 1]
    if array.shape[: len(leading)] != leading:
        raise StoreError(f"{array.path} has {array.shape[: len(leading)]} samples (and views); wanted {leading}.")
    features.array(array.path).find(range(int(np.prod(leading))))  # every row is where its file says


def _account(features: Features, files: int, size: int) -> str:
    said, counts = features.attributes, dict(zip(*np.unique(features.split, return_counts=True), strict=True))
    lines = [
        f"{features.location}: whole ({files} files, {size / 1e9:.3f} GB), contract {said['contract']}",
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
    for name in ("backbone", "weights", "bands", "input_size", "images_sha256", "content_sha256"):
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
