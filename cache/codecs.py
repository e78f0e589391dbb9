"""Storage of features: the codec of a level, the cast to a smaller dtype, and the shard files.

Codecs: `none` is the default and the fastest to read. `lz4` and `zstd` (Blosc with byte shuffle) are lossless. `int8`
stores each channel of each map as 8-bit integers and a `scale`, which halves the bytes at no cost in accuracy
(docs/decisions/machinery.md).

Casting: a shard's features are cast to the stored dtype, the cast is checked, and its error is measured.

Shard files: the Zarr v3 sharding format. zarr-python writes the same bytes, which a test compares, but slower
(benchmarks/writer.py).
Source: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

from concurrent.futures import Executor
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import google_crc32c
import numpy as np

from cache.errors import StoreError

if TYPE_CHECKING:
    from zarr.codecs import BloscCodec

COMPRESSION_LEVEL = 5
_COMPRESSORS = ("lz4", "zstd")
_INT8_MAX = 127
# float16 values below the smallest normal number lose digits. A few such values are noise; most of them are a loss.
_MAX_SUBNORMAL_FRACTION = 0.5
# Every such value of a sample is examined; coprime to the usual widths of maps, so that all columns are.
_SUBNORMAL_STEP = 7
# Values of a task: few enough to stay in the cache of a core between the steps.
_BLOCK_VALUES = 2**18
# Offset and length in the index of a chunk that was never written.
EMPTY = 2**64 - 1
_CHECKSUM_BYTES = 4
_INDEX_ENTRY_BYTES = 16


@dataclass(frozen=True)
class Codec:
    """Storage format of a level: `none`, `lz4`, `zstd` or `int8`."""

    name: str

    @property
    def has_scale(self) -> bool:
        """Whether the values are stored with less precision, as integers and an array `scale`."""
        return self.name == "int8"

    def stored_dtype(self, dtype: str) -> str:
        """Return the dtype on disk of features that are read as `dtype`."""
        return "int8" if self.has_scale else dtype

    def compressor(self, dtype: str) -> "BloscCodec | None":
        """Return the compressor of values of `dtype`, for the metadata of a Zarr array."""
        if self.name not in _COMPRESSORS:
            return None
        # zarr takes 0.25 s to import, and reading params.yaml needs only the names of codecs.
        from zarr.codecs import BloscCodec

        typesize = np.dtype(dtype).itemsize
        return BloscCodec(cname=self.name, clevel=COMPRESSION_LEVEL, shuffle="shuffle", typesize=typesize)

    def compress(self, chunk: np.ndarray) -> bytes | memoryview:
        """Return the bytes of one chunk, which is in C order."""
        if self.name not in _COMPRESSORS:
            return chunk.data.cast("B")
        # numcodecs takes 0.1 s to import, and reading params.yaml needs only the names of codecs.
        from numcodecs import blosc

        cname = self.name.encode()
        return blosc.compress(chunk, cname, COMPRESSION_LEVEL, blosc.SHUFFLE, 0, typesize=chunk.dtype.itemsize)


NONE = Codec("none")


def parse_codec(name: str) -> Codec:
    """Return the codec of a name; ValueError if there is none."""
    if name not in ("none", *_COMPRESSORS, "int8"):
        raise ValueError(f"there is no codec '{name}'; there are none, {', '.join(_COMPRESSORS)} and int8")
    return Codec(name)


def quantize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 values and their float32 scale (…, channel) of floats (…, channel, y, x).

    Raises ValueError for NaN or infinite values.
    """
    if not np.isfinite(values).all():
        raise ValueError("NaN or infinite values, which int8 cannot hold")
    dtype_max = np.float32(np.finfo(values.dtype).max)
    # Rounded down at the end of the range, so that no value is read as infinity.
    max_scale = np.nextafter(dtype_max / np.float32(_INT8_MAX), np.float32(0))
    scale = np.minimum(np.abs(values).max(axis=(-2, -1)).astype(np.float32) / np.float32(_INT8_MAX), max_scale)
    divisor = np.where(scale > 0, scale, 1)[..., None, None]
    return np.clip(np.rint(values / divisor), -_INT8_MAX, _INT8_MAX).astype(np.int8), scale


def dequantize(quantized: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """Write int8 values (…, channel, y, x) times their scale (…, channel) to `out`."""
    np.multiply(quantized, scale[..., None, None], out=out, casting="unsafe")


# Casting


class CastStats(NamedTuple):
    """What a cast does to each sample: arrays (sample,) of NumPy or torch.

    Attributes:
        n_nonfinite: NaN and infinite values.
        n_too_large: finite values too large for the dtype.
        max_too_large: the largest magnitude of these, or 0.
        n_subnormal: values below the dtype's smallest normal number, zeros excluded; in a sample of the values.
        n_nonzero: in the same sample of the values.
        squared_error: sum of squares of the differences that the cast makes, over finite values that fit the dtype.
        sum_of_squares: of these values.
    """

    n_nonfinite: Any
    n_too_large: Any
    max_too_large: Any
    n_subnormal: Any
    n_nonzero: Any
    squared_error: Any
    sum_of_squares: Any


def measure_cast(values: Any, result: Any, dtype: str, xp: ModuleType) -> CastStats:
    """Compare values with what is read of them after the cast to `dtype`, without waiting for a GPU.

    Both are floats of one dtype (sample, value); `xp` is the module of the arrays, `numpy` or `torch`.
    """
    error, sampled = result - values, xp.abs(values[:, ::_SUBNORMAL_STEP])
    squared_error, sum_of_squares = xp.square(error).sum(1), xp.square(values).sum(1)
    n_zero = (sampled == 0).sum(1)
    n_nonfinite = n_too_large = max_too_large = xp.zeros_like(sum_of_squares)
    # On a CPU the check of the sums is cheap and saves the passes below. On a GPU it would wait.
    if getattr(values, "is_cuda", False) or not xp.isfinite(squared_error + sum_of_squares).all():
        is_finite, fits = xp.isfinite(values), xp.isfinite(result)
        is_too_large = is_finite & ~fits
        n_nonfinite, n_too_large = (~is_finite).sum(1), is_too_large.sum(1)
        max_too_large = xp.amax(xp.where(is_too_large, xp.abs(values), 0), 1)
        squared_error, sum_of_squares = (
            xp.square(xp.where(is_finite & fits, part, 0)).sum(1) for part in (error, values)
        )
    n_subnormal = (sampled < float(np.finfo(dtype).tiny)).sum(1) - n_zero
    n_nonzero = sampled.shape[1] - n_zero
    return CastStats(n_nonfinite, n_too_large, max_too_large, n_subnormal, n_nonzero, squared_error, sum_of_squares)


def check_cast(stats: CastStats, name: str, dtype: str) -> dict[str, float]:
    """Check a cast to `dtype`; return `squared_error` and `sum_of_squares` of the array.

    Raises StoreError if values are too large for the dtype, or most are so small that they lose digits.
    """
    remedy = "Store this backbone with extract.dtype: float32."
    if n_too_large := int(stats.n_too_large.sum()):
        raise StoreError(
            f"{n_too_large} values of {name} are too large for {dtype} (up to {stats.max_too_large.max():.4g}, limit "
            f"{np.finfo(dtype).max:.5g}). {remedy}",
            key="extract.dtype", value=dtype,
        )  # fmt: skip
    n_subnormal, n_nonzero = stats.n_subnormal.sum(), stats.n_nonzero.sum()
    if n_subnormal > _MAX_SUBNORMAL_FRACTION * n_nonzero:
        raise StoreError(
            f"Most values of {name} ({n_subnormal / n_nonzero:.0%}) are below the smallest normal {dtype} "
            f"({np.finfo(dtype).tiny:.2g}) and would lose digits. {remedy}",
            key="extract.dtype", value=dtype,
        )  # fmt: skip
    return {key: float(getattr(stats, key).sum(dtype=np.float64)) for key in ("squared_error", "sum_of_squares")}


@dataclass
class CastArray:
    """One array of one shard, ready to be stored."""

    stored: np.ndarray  # in C order
    scale: np.ndarray | None = None  # of int8 only
    stats: CastStats | None = None  # of the cast and the codec; None if they change nothing


def cast_array(values: np.ndarray, name: str, dtype: str, codec: Codec, pool: Executor) -> CastArray:
    """Cast values (sample, …) to `dtype` and quantize them with the codec, in parallel blocks of samples.

    Raises StoreError if int8 is given NaN or infinite values, which pass through every other codec.
    """
    if values.dtype == dtype and not codec.has_scale:
        return CastArray(np.ascontiguousarray(values))
    cast = CastArray(np.empty(values.shape, codec.stored_dtype(dtype)))
    if codec.has_scale:
        cast.scale = np.empty(values.shape[:-2], "float32")
    step = max(1, _BLOCK_VALUES // max(1, values[:1].size))
    blocks = [slice(start, start + step) for start in range(0, len(values), step)]
    try:
        stats = list(pool.map(lambda rows: _cast_block(values[rows], rows, dtype, codec, cast), blocks))
    except ValueError as error:
        raise StoreError(
            f"{name} has {error}. Store this backbone with extract.codec: none.",
            key="extract.codec", value=codec.name,
        ) from None  # fmt: skip
    cast.stats = CastStats(*map(np.concatenate, zip(*stats, strict=True)))
    return cast


def _cast_block(values: np.ndarray, rows: slice, dtype: str, codec: Codec, cast: CastArray) -> CastStats:
    """Write some samples to `cast`."""
    # No square of a float16 overflows float32.
    precise = np.float32 if dtype == "float16" else np.float64
    with np.errstate(over="ignore", invalid="ignore"):
        low = np.ascontiguousarray(values).astype(dtype)
        # Too large values are reported by their statistics, not as the infinities that they become.
        if not codec.has_scale:
            cast.stored[rows] = low
        elif not (np.isinf(low) & np.isfinite(values)).any():
            cast.stored[rows], cast.scale[rows] = quantize(low)
            dequantize(cast.stored[rows], cast.scale[rows], out=low)
        original, result = (array.reshape(len(low), -1).astype(precise) for array in (values, low))
        return measure_cast(original, result, dtype, np)


# Shard files


def encode(chunks: list[bytes | memoryview], n_entries: int) -> list[bytes | memoryview]:
    """Return the parts of a shard file: the chunks in order, an index of so many entries, and its CRC-32C."""
    index = np.full((n_entries, 2), EMPTY, dtype="<u8")
    lengths = np.array([len(chunk) for chunk in chunks], dtype="<u8")
    index[: len(chunks), 1] = lengths
    index[: len(chunks), 0] = np.concatenate([[0], np.cumsum(lengths[:-1])])
    index_bytes = index.tobytes()
    return [*chunks, index_bytes, google_crc32c.value(index_bytes).to_bytes(_CHECKSUM_BYTES, "little")]


def index_size(n_chunks: int) -> int:
    """Return the bytes at the end of a shard file of `n_chunks` chunks: its index and the checksum."""
    return n_chunks * _INDEX_ENTRY_BYTES + _CHECKSUM_BYTES


def decode_index(tail: bytes, n_chunks: int) -> np.ndarray:
    """Decode offset and length, uint64 (chunk, 2), of chunks; ValueError if incomplete or damaged."""
    if len(tail) != index_size(n_chunks):
        raise ValueError("it is shorter than its index")
    index, checksum = tail[:-_CHECKSUM_BYTES], int.from_bytes(tail[-_CHECKSUM_BYTES:], "little")
    if google_crc32c.value(index) != checksum:
        raise ValueError("the checksum of its index is wrong")
    return np.frombuffer(index, dtype="<u8").reshape(n_chunks, 2)
