"""Cast a shard's features to what is stored, check the cast, and measure its error."""

from concurrent.futures import Executor
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from cache.codecs import Codec, dequantize
from cache.errors import StoreError

# float16 values below the smallest normal number lose digits. A few such values are noise; most of them are a loss.
_MAX_SUBNORMAL_FRACTION = 0.5
# Values of a task: few enough to stay in the cache of a core between the steps.
_BLOCK_VALUES = 2**18


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
        squared_error: sum of squares of the differences to the values given, over finite values.
        sum_of_squares: of the values given, over finite values.
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
