"""From a shard's values to what is stored of them: checked, narrowed, and the loss measured."""

from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from cache.codecs import Codec, dequantize
from cache.errors import StoreError

# A float16 below its smallest normal number loses digits; a few such values are noise, most of them are a loss.
_MAX_SUBNORMAL_FRACTION = 0.5
# Values in a task: few enough that they stay in a core's own cache from one step to the next.
_BLOCK_VALUES = 2**18


@dataclass
class CastArray:
    """One array of one shard.

    Attributes:
        stored: what goes to disk, C order.
        scale: of int8, else None.
        error, size: sums of squares over finite values, of what was lost and of what was given.
    """

    stored: np.ndarray
    scale: np.ndarray | None
    squared_error: float = 0.0
    sum_of_squares: float = 0.0


def cast_array(values: np.ndarray, name: str, dtype: str, codec: Codec, pool: Executor) -> CastArray:
    """Narrow `values` (sample, …) to `dtype` and then lose what the codec loses, a block of samples a task.

    Raises:
        StoreError: finite values that do not fit the dtype, values most of which would underflow, or NaN and
            infinities for int8. NaN and infinities pass through every other codec.
    """
    if values.dtype == dtype and not codec.is_lossy:
        return CastArray(np.ascontiguousarray(values), None)
    step = max(1, _BLOCK_VALUES // max(1, values[:1].size))
    prepared = CastArray(
        np.empty(values.shape, codec.stored_dtype(dtype)),
        np.empty(values.shape[:-2], "float32") if codec.has_scale else None,
    )
    blocks = [slice(start, start + step) for start in range(0, len(values), step)]
    try:
        counts = np.array(list(pool.map(lambda rows: _cast_block(values, rows, dtype, codec, prepared), blocks)))
    except ValueError as error:
        raise StoreError(f"{name} has {error}. Store this backbone with extract.codec: none.") from None
    prepared.squared_error, prepared.sum_of_squares = check_cast(counts, name, dtype)
    return prepared


def check_cast(counts: np.ndarray, name: str, dtype: str) -> tuple[float, float]:
    """Whether values survived being narrowed to `dtype`.

    Args:
        counts: (part, 6), of any parts of an array: finite values too large for the dtype, the largest magnitude
            among them, values below its smallest normal number, values that are not zero; sums of squares of what
            was lost and of what was given, over finite values. Both counts of small values may be of a sample.
        name: the array's, for the message.

    Returns:
        Squares lost and given.

    Raises:
        StoreError: values that do not fit, or most of which would lose their digits.
    """
    too_large, _, faint, nonzero, error, size = counts.sum(axis=0).tolist()
    if too_large:
        raise StoreError(
            f"{int(too_large)} values of {name} are too large for {dtype} (up to {counts[:, 1].max():.4g}, limit "
            f"{np.finfo(dtype).max:.5g}). Store this backbone with extract.dtype: float32."
        )
    if faint > _MAX_SUBNORMAL_FRACTION * nonzero:
        raise StoreError(
            f"Most values of {name} ({faint / nonzero:.0%}) are too small for {dtype}, below its smallest normal "
            f"number {np.finfo(dtype).tiny:.2g}, and would lose their digits. Store this backbone with "
            "extract.dtype: float32."
        )
    return error, size


def _cast_block(values: np.ndarray, rows: slice, dtype: str, codec: Codec, into: CastArray) -> tuple[float, ...]:
    """Store a few samples; what `judge` wants to know of them."""
    given = np.ascontiguousarray(values[rows])
    narrow = np.empty(given.shape, dtype) if codec.is_lossy else into.stored[rows]
    with np.errstate(over="ignore"):
        np.copyto(narrow, given, casting="same_kind")
    magnitude = np.abs(given)
    zeros = np.count_nonzero(magnitude == 0)
    nonzero, faint = given.size - zeros, np.count_nonzero(magnitude < np.finfo(dtype).tiny) - zeros
    fits = magnitude.max(initial=0) <= np.finfo(dtype).max  # not so if there is a NaN
    lost = False if fits else np.isinf(narrow) & np.isfinite(given)
    if np.any(lost):
        return np.count_nonzero(lost), magnitude[lost].max(), faint, nonzero, 0.0, 0.0
    kept = narrow
    if codec.is_lossy:
        into.stored[rows], scale = codec.quantize(narrow)
        kept = into.stored[rows]
    if codec.has_scale:
        into.scale[rows] = scale
        dequantize(kept, scale, narrow)
        kept = narrow
    # No square of a float16 is too large for float32.
    precise = np.float32 if fits and dtype == "float16" else np.float64
    given, kept = given.astype(precise, copy=False), kept.astype(precise)
    if not fits:
        finite = np.isfinite(given)
        given, kept = np.where(finite, given, 0), np.where(finite, kept, 0)
    return 0, 0.0, faint, nonzero, _squares(np.subtract(kept, given, out=kept)), _squares(given)


def _squares(values: np.ndarray) -> float:
    """Summed by numpy alone: a dot product's last digits would depend on how many threads BLAS has."""
    return float(np.square(values).sum())
