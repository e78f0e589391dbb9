"""One file of an array: the Zarr v3 sharding format, and the plain chunk of arrays without shards.

zarr-python writes the same bytes, as a test compares, and more slowly (benchmarks/writer).
Source: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

from collections.abc import Iterable

import google_crc32c
import numpy as np

# Offset and length of a chunk that was never written.
EMPTY = 2**64 - 1
_CHECKSUM = 4


def encode(chunks: Iterable[bytes | memoryview], n_chunks: int) -> list[bytes | memoryview]:
    """The parts of a shard file: its chunks in order, then the index of `places` chunks and its CRC-32C."""
    parts = list(chunks)
    index = np.full((n_chunks, 2), EMPTY, dtype="<u8")
    lengths = np.array([len(part) for part in parts], dtype="<u8")
    index[: len(parts), 1] = lengths
    index[: len(parts), 0] = np.concatenate([[0], np.cumsum(lengths[:-1])])
    written = index.tobytes()
    return [*parts, written, google_crc32c.value(written).to_bytes(_CHECKSUM, "little")]


def index_size(n_chunks: int) -> int:
    """Length of the index at the end of a shard file of `places` chunks, with its checksum."""
    return n_chunks * 16 + _CHECKSUM


def decode_index(tail: bytes, n_chunks: int) -> np.ndarray:
    """Offset and length of every chunk, uint64 (place, 2), from the end of a shard file.

    Raises:
        ValueError: the index is torn or damaged.
    """
    if len(tail) != index_size(n_chunks):
        raise ValueError("it is shorter than its index")
    written, checksum = tail[:-_CHECKSUM], int.from_bytes(tail[-_CHECKSUM:], "little")
    if google_crc32c.value(written) != checksum:
        raise ValueError("the checksum of its index is wrong")
    return np.frombuffer(written, dtype="<u8").reshape(n_chunks, 2)
