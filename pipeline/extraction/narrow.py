"""Narrowing features to the store's dtype where they are computed, so that half as many bytes leave the device.

Of a GPU, levels alone: pooled vectors are few bytes, and the writer narrows them. What it finds on the way is what
`cache.casting` finds of values that a writer narrows itself.
"""

import torch

# Of every so many samples of a batch, one is looked at for values too small for the dtype.
_EVERY = 8
# Columns of a tally: those of `cache.casting.judge`, and values that are no finite numbers.
_COLUMNS = 7


def cast_with_stats(values: torch.Tensor, dtype: torch.dtype, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (sample, channel, …) in `dtype`, and float64 (sample, 7) of what that does to each sample.

    Nothing here waits for a GPU.

    Args:
        first: the first sample's number in its batch.
    """
    low = values.to(dtype)
    last = not values.is_contiguous()  # asked once: `low` may lie otherwise
    given = _flat(values, last).float()
    lost = _flat(low, last).to(torch.float32, copy=True).sub_(given)
    size, error = (torch.linalg.vector_norm(each, dim=1) for each in (given, lost))
    tally = torch.zeros(len(values), _COLUMNS, dtype=torch.float64, device=values.device)
    # On a processor a look at the norms is cheap, and saves the passes below.
    if values.is_cuda or not bool(torch.isfinite(size + error).all()):
        finite = given.isfinite()
        over = lost.isinf() & finite
        tally[:, 0] = over.sum(dim=1)
        tally[:, 1] = torch.where(over, given, 0).abs().amax(dim=1)
        tally[:, 6] = (~finite).sum(dim=1)
        size, error = (
            torch.linalg.vector_norm(torch.where(finite & ~over, each, 0), dim=1, dtype=torch.float64)
            for each in (given, lost)
        )
    some = slice(-first % _EVERY, None, _EVERY)
    if len(few := given[some].abs()):
        zeros = (few == 0).sum(dim=1)
        tally[some, 2] = ((few < torch.finfo(dtype).tiny).sum(dim=1) - zeros).double()
        tally[some, 3] = (few.shape[1] - zeros).double()
    tally[:, 4], tally[:, 5] = error.double().square(), size.double().square()
    return low, tally


def count_nonfinite(values: torch.Tensor) -> torch.Tensor:
    """The tally of values that stay as they are, of which only the last column says anything."""
    tally = torch.zeros(len(values), _COLUMNS, dtype=torch.float64, device=values.device)
    tally[:, 6] = (~values.isfinite()).flatten(1).sum(dim=1)
    return tally


def _flat(values: torch.Tensor, last: bool) -> torch.Tensor:
    """(sample, values), channels last where they lie so in memory."""
    return (values.movedim(1, -1) if last else values).flatten(1)
