"""From a shard's values to what is stored of them: checked, narrowed, and the loss measured."""

from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from cache.codecs import Codec, restore
from cache.schema import StoreError

# A float16 below its smallest normal number loses digits; a few such values are noise, most of them are a loss.
_FAINT_SHARE = 0.5


@dataclass
class Prepared:
    """One array of one shard.

    Attributes:
        stored: what goes to disk, C order.
        scale: of int8, else None.
        error, size: sums of squares over finite values, of what was lost and of what was given.
    """

    stored: np.ndarray
    scale: np.ndarray | None
    error: float = 0.0
    size: float = 0.0


def prepare(values: np.ndarray, name: str, dtype: str, codec: Codec, pool: Executor) -> Prepared:
    """Narrow `values` (sample, …) to `dtype` and then lose what the codec loses, a sample a task.

    Raises:
        StoreError: finite values that do not fit the dtype, values most of which would underflow, or NaN and
            infinities for int8. NaN and infinities pass through every other codec.
    """
    prepared = Prepared(
        np.empty(values.shape, codec.stored(dtype)),
        np.empty(values.shape[:-2], "float32") if codec.scaled else None,
    )
    # Vectors are too short for a task each.
    step = 1 if values.ndim > 3 else len(values)
    blocks = [slice(start, start + step) for start in range(0, len(values), step)]
    try:
        counts = np.array(list(pool.map(lambda rows: _block(values, rows, dtype, codec, prepared), blocks)))
    except ValueError as error:
        raise StoreError(f"{name} has {error}. Store this backbone with extract.codec: none.") from None
    too_large, largest, faint, nonzero = (
        *counts[:, 0].sum(keepdims=True),
        counts[:, 1].max(),
        *counts[:, 2:4].sum(axis=0),
    )
    if too_large:
        raise StoreError(
            f"{int(too_large)} values of {name} are too large for {dtype} (up to {largest:.4g}, limit "
            f"{np.finfo(dtype).max:.5g}). Store this backbone with extract.dtype: float32."
        )
    if faint > _FAINT_SHARE * nonzero:
        raise StoreError(
            f"Most values of {name} ({faint / nonzero:.0%}) are too small for {dtype}, below its smallest normal "
            f"number {np.finfo(dtype).tiny:.2g}, and would lose their digits. Store this backbone with "
            "extract.dtype: float32."
        )
    prepared.error, prepared.size = counts[:, 4:].sum(axis=0).tolist()
    return prepared


def _block(values: np.ndarray, rows: slice, dtype: str, codec: Codec, into: Prepared) -> tuple[float, ...]:
    """Store a few samples; counts: too large, the largest of them, faint, non-zero; squares: lost, given."""
    given = np.ascontiguousarray(values[rows])
    magnitude = np.abs(given)
    with np.errstate(over="ignore"):
        narrow = given.astype(dtype, copy=False)
    nonzero = np.count_nonzero(given)
    faint = np.count_nonzero(magnitude < np.finfo(dtype).tiny) - (given.size - nonzero)
    finite = np.isfinite(magnitude.max(initial=0))
    lost = None if finite and np.isfinite(narrow).all() else np.isinf(narrow) & np.isfinite(given)
    if lost is not None and lost.any():
        return np.count_nonzero(lost), magnitude[lost].max(), faint, nonzero, 0.0, 0.0
    into.stored[rows], scale = codec.lose(narrow)
    if scale is None:
        kept = into.stored[rows]
    else:
        into.scale[rows] = scale
        kept = np.empty_like(narrow)
        restore(into.stored[rows], scale, kept)
    if not finite:
        given, kept = np.where(np.isfinite(given), given, 0), np.where(np.isfinite(given), kept, 0)
    return 0, 0.0, faint, nonzero, _squares(kept.astype(np.float64) - given), _squares(given)


def _squares(values: np.ndarray) -> float:
    """Summed by numpy alone: a dot product's last digits would depend on how many threads BLAS has."""
    return float(np.square(values, dtype=np.float64).sum())
