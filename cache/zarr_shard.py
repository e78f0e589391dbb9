"""Encode and decode shard files: the Zarr v3 sharding format.

zarr-python writes the same bytes, which a test compares, but slower (benchmarks/writer.py).
Source: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

from collections.abc import Iterable

import google_crc32c
import numpy as np

# Offset and length in the index of a chunk that was never written.
EMPTY = 2**64 - 1
_CHECKSUM_BYTES = 4
_INDEX_ENTRY_BYTES = 16


def encode(chunks: Iterable[bytes | memoryview], n_chunks: int) -> list[bytes | memoryview]:
    """Return the parts of a shard file: the chunks in order, their index, and its CRC-32C.

    Args:
        n_chunks: entries of the index, at least the number of chunks; the remaining ones are empty.
    """
    parts = list(chunks)
    index = np.full((n_chunks, 2), EMPTY, dtype="<u8")
    lengths = np.array([len(part) for part in parts], dtype="<u8")
    index[: len(parts), 1] = lengths
    index[: len(parts), 0] = np.concatenate([[0], np.cumsum(lengths[:-1])])
    index_bytes = index.tobytes()
    return [*parts, index_bytes, google_crc32c.value(index_bytes).to_bytes(_CHECKSUM_BYTES, "little")]


def index_size(n_chunks: int) -> int:
    """Return the bytes at the end of a shard file of `n_chunks` chunks: its index and the checksum."""
    return n_chunks * _INDEX_ENTRY_BYTES + _CHECKSUM_BYTES


def decode_index(tail: bytes, n_chunks: int) -> np.ndarray:
    """Return offset and length of every chunk, uint64 (chunk, 2), from the end of a shard file.

    Raises:
        ValueError: the index is incomplete or damaged.
    """
    if len(tail) != index_size(n_chunks):
        raise ValueError("it is shorter than its index")
    index, checksum = tail[:-_CHECKSUM_BYTES], int.from_bytes(tail[-_CHECKSUM_BYTES:], "little")
    if google_crc32c.value(index) != checksum:
        raise ValueError("the checksum of its index is wrong")
    return np.frombuffer(index, dtype="<u8").reshape(n_chunks, 2)
