"""Storage of features: the codec of a level, the cast to a smaller dtype, and the shard files.

Codecs: `none` is the default and the fastest to read. `lz4` and `zstd` (Blosc with byte shuffle) are lossless.
`bitround<k>` keeps k bits of the mantissa and then compresses with zstd (Klöwer et al. 2021,
doi:10.1038/s43588-021-00156-2); readers get ordinary floats. `int8` stores each channel of each map as 8-bit integers
and a `scale`.

Casting: a shard's features are cast to the stored dtype, the cast is checked, and its error is measured.

Shard files: the Zarr v3 sharding format. zarr-python writes the same bytes, which a test compares, but slower
(benchmarks/writer.py).
Source: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

import re
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

from cache.errors import StoreError

if TYPE_CHECKING:
    from zarr.codecs import BloscCodec

COMPRESSION_LEVEL = 5
_COMPRESSORS = {"lz4": "lz4", "zstd": "zstd", "bitround": "zstd"}
_INT8_MAX = 127
_MANTISSA_BITS = {"float16": 10, "float32": 23}
# float16 values below the smallest normal number lose digits. A few such values are noise; most of them are a loss.
_MAX_SUBNORMAL_FRACTION = 0.5
# Values of a task: few enough to stay in the cache of a core between the steps.
_BLOCK_VALUES = 2**18
# Offset and length in the index of a chunk that was never written.
EMPTY = 2**64 - 1
_CHECKSUM_BYTES = 4
_INDEX_ENTRY_BYTES = 16


# Codecs


@dataclass(frozen=True)
class Codec:
    """Storage format of a level.

    Attributes:
        name: `none`, `lz4`, `zstd`, `bitround` or `int8`.
        keepbits: mantissa bits that `bitround` keeps.
    """

    name: str
    keepbits: int = 0

    @property
    def has_scale(self) -> bool:
        """Whether the store has an array `scale` for the features."""
        return self.name == "int8"

    @property
    def is_lossy(self) -> bool:
        """Whether the values that are read differ from those written."""
        return self.name in ("bitround", "int8")

    @property
    def label(self) -> str:
        """The name that `parse_codec` reads."""
        return f"bitround{self.keepbits}" if self.name == "bitround" else self.name

    def stored_dtype(self, dtype: str) -> str:
        """Return the dtype on disk of features that are read as `dtype`."""
        return "int8" if self.has_scale else dtype

    def compressor(self) -> "BloscCodec | None":
        """Return the compressor for the metadata of a Zarr array."""
        # zarr takes 0.25 s to import, and reading params.yaml needs only the names of codecs.
        from zarr.codecs import BloscCodec

        name = _COMPRESSORS.get(self.name)
        return BloscCodec(cname=name, clevel=COMPRESSION_LEVEL, shuffle="shuffle") if name else None

    def compress(self, chunk: np.ndarray) -> bytes | memoryview:
        """Return the bytes of one chunk, which is in C order."""
        if self.name not in _COMPRESSORS:
            return chunk.data.cast("B")
        # numcodecs takes 0.1 s to import, and reading params.yaml needs only the names of codecs.
        from numcodecs import blosc

        name = _COMPRESSORS[self.name].encode()
        return blosc.compress(chunk, name, COMPRESSION_LEVEL, blosc.SHUFFLE, 0, typesize=chunk.dtype.itemsize)

    def quantize(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Remove the digits that the codec does not store.

        Args:
            values: float16 or float32 (…, channel, y, x).

        Returns:
            The array to store (…, channel, y, x), and the float32 scale (…, channel) of `int8`, else None.

        Raises:
            ValueError: `int8` cannot represent NaN or infinite values.
        """
        if self.name == "bitround":
            # numcodecs takes 0.1 s to import, and reading params.yaml needs only the names of codecs.
            from numcodecs.bitround import BitRound

            rounded = BitRound(self.keepbits).decode(BitRound(self.keepbits).encode(values.copy()))
            rounded = rounded.view(values.dtype).reshape(values.shape)
            # Rounding turns NaN into a finite value and the largest values into infinity.
            return np.where(np.isfinite(values) & np.isfinite(rounded), rounded, values), None
        if self.has_scale:
            if not np.isfinite(values).all():
                raise ValueError("NaN or infinite values, which int8 cannot hold")
            dtype_max = np.float32(np.finfo(values.dtype).max)
            # Rounded down at the end of the range, so that no value is read as infinity.
            max_scale = np.nextafter(dtype_max / np.float32(_INT8_MAX), np.float32(0))
            scale = np.minimum(
                np.abs(values).max(axis=(-2, -1)).astype(np.float32) / np.float32(_INT8_MAX), max_scale
            )
            divisor = np.where(scale > 0, scale, 1)[..., None, None]
            return np.clip(np.rint(values / divisor), -_INT8_MAX, _INT8_MAX).astype(np.int8), scale
        return values, None


NONE = Codec("none")


def parse_codec(name: str, dtype: str) -> Codec:
    """Return the codec of a name such as `zstd` or `bitround6`.

    Raises:
        ValueError: there is no such codec, or it keeps more bits than the dtype has.
    """
    bits = _MANTISSA_BITS[dtype]
    if match := re.fullmatch(r"bitround(\d+)", name):
        if 1 <= int(match[1]) <= bits:
            return Codec("bitround", int(match[1]))
        raise ValueError(f"'{name}' keeps {match[1]} bits of the mantissa; {dtype} has {bits}: bitround1 to {bits}")
    if name not in ("none", "lz4", "zstd", "int8"):
        raise ValueError(f"there is no codec '{name}'; there are none, lz4, zstd, bitround<bits kept> and int8")
    return Codec(name)


def dequantize(quantized: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """Write int8 values (…, channel, y, x) times their scale (…, channel) to `out`."""
    np.multiply(quantized, scale[..., None, None], out=out, casting="unsafe")


# Casting


class CastStat(IntEnum):
    """Columns of the statistics that `check_cast` reads.

    The sums are over finite values. `N_SUBNORMAL` and `N_NONZERO` may both be counts in a sample of the values.
    """

    N_TOO_LARGE = 0  # finite values too large for the dtype
    MAX_TOO_LARGE = 1  # the largest magnitude of these
    N_SUBNORMAL = 2  # values below the dtype's smallest normal number, zeros excluded
    N_NONZERO = 3
    SQUARED_ERROR = 4  # sum of squares of the differences that the cast makes
    SUM_OF_SQUARES = 5  # of the values


@dataclass
class CastArray:
    """One array of one shard, ready to be stored.

    Attributes:
        stored: the array to write, in C order.
        scale: of int8, else None.
        squared_error: sum of squares of the differences to the input values, over finite values.
        sum_of_squares: of the input values, over finite values.
    """

    stored: np.ndarray
    scale: np.ndarray | None
    squared_error: float = 0.0
    sum_of_squares: float = 0.0


def cast_array(values: np.ndarray, name: str, dtype: str, codec: Codec, pool: Executor) -> CastArray:
    """Cast values to `dtype` and quantize them with the codec, in parallel blocks of samples.

    Args:
        values: (sample, …).
        name: the array's name, for messages.
        dtype: float16 or float32.

    Raises:
        StoreError: finite values do not fit the dtype, most values would underflow, or int8 is given NaN or infinite
            values. NaN and infinite values pass through every other codec.
    """
    if values.dtype == dtype and not codec.is_lossy:
        return CastArray(np.ascontiguousarray(values), None)
    step = max(1, _BLOCK_VALUES // max(1, values[:1].size))
    cast = CastArray(
        np.empty(values.shape, codec.stored_dtype(dtype)),
        np.empty(values.shape[:-2], "float32") if codec.has_scale else None,
    )
    blocks = [slice(start, start + step) for start in range(0, len(values), step)]
    try:
        stats = np.array(list(pool.map(lambda rows: _cast_block(values, rows, dtype, codec, cast), blocks)))
    except ValueError as error:
        raise StoreError(
            f"{name} has {error}. Store this backbone with extract.codec: none.",
            key="extract.codec",
            value=codec.label,
        ) from None
    cast.squared_error, cast.sum_of_squares = check_cast(stats, name, dtype)
    return cast


def check_cast(stats: np.ndarray, name: str, dtype: str) -> tuple[float, float]:
    """Check that an array survives the cast to `dtype`.

    Args:
        stats: float64 (part, 6), the columns of `CastStat` for any parts of the array.
        name: the array's name, for messages.

    Returns:
        Sums of squares over the array: of the differences that the cast makes, and of the values.

    Raises:
        StoreError: values are too large for the dtype, or most values are so small that they lose digits.
    """
    total = stats.sum(axis=0).tolist()
    if n_too_large := int(total[CastStat.N_TOO_LARGE]):
        raise StoreError(
            f"{n_too_large} values of {name} are too large for {dtype} (up to "
            f"{stats[:, CastStat.MAX_TOO_LARGE].max():.4g}, limit {np.finfo(dtype).max:.5g}). Store this backbone "
            "with extract.dtype: float32.",
            key="extract.dtype",
            value=dtype,
        )
    if total[CastStat.N_SUBNORMAL] > _MAX_SUBNORMAL_FRACTION * total[CastStat.N_NONZERO]:
        fraction = total[CastStat.N_SUBNORMAL] / total[CastStat.N_NONZERO]
        raise StoreError(
            f"Most values of {name} ({fraction:.0%}) are below the smallest normal {dtype} "
            f"({np.finfo(dtype).tiny:.2g}) and would lose digits. Store this backbone with extract.dtype: float32.",
            key="extract.dtype",
            value=dtype,
        )
    return total[CastStat.SQUARED_ERROR], total[CastStat.SUM_OF_SQUARES]


def _cast_block(values: np.ndarray, rows: slice, dtype: str, codec: Codec, cast: CastArray) -> tuple:
    """Write some samples to `cast`; returns the columns of `CastStat` for them."""
    block = np.ascontiguousarray(values[rows])
    low = np.empty(block.shape, dtype) if codec.is_lossy else cast.stored[rows]
    with np.errstate(over="ignore"):
        np.copyto(low, block, casting="same_kind")
    magnitude = np.abs(block)
    n_zero = np.count_nonzero(magnitude == 0)
    n_nonzero = block.size - n_zero
    n_subnormal = np.count_nonzero(magnitude < np.finfo(dtype).tiny) - n_zero
    is_simple = magnitude.max(initial=0) <= np.finfo(dtype).max  # False also for NaN
    overflow = False if is_simple else np.isinf(low) & np.isfinite(block)
    if np.any(overflow):
        return np.count_nonzero(overflow), magnitude[overflow].max(), n_subnormal, n_nonzero, 0.0, 0.0
    result = low
    if codec.is_lossy:
        cast.stored[rows], scale = codec.quantize(low)
        result = cast.stored[rows]
    if codec.has_scale:
        cast.scale[rows] = scale
        dequantize(result, scale, low)
        result = low
    # No square of a float16 overflows float32.
    precise = np.float32 if is_simple and dtype == "float16" else np.float64
    block, result = block.astype(precise, copy=False), result.astype(precise)
    if not is_simple:
        finite = np.isfinite(block)
        block, result = np.where(finite, block, 0), np.where(finite, result, 0)
    squared_error = _sum_of_squares(np.subtract(result, block, out=result))
    return 0, 0.0, n_subnormal, n_nonzero, squared_error, _sum_of_squares(block)


def _sum_of_squares(values: np.ndarray) -> float:
    """Sum by NumPy: the rounding of a BLAS dot product depends on the number of threads."""
    return float(np.square(values).sum())


# Shard files


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
