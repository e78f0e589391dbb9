"""Which device to compute on."""

import os

from pipeline.errors import UserError


def device(wanted: str) -> str:
    """`cpu` or `cuda` for the parameter `compute.device`.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    import torch

    present = torch.cuda.is_available()
    if wanted == "cuda" and not present:
        raise UserError(
            "compute.device is 'cuda', but torch sees no CUDA device here. "
            "Set compute.device to 'auto' or 'cpu', or run where `nvidia-smi` lists a GPU."
        )
    if not present or wanted == "cpu":
        return "cpu"
    _exact()
    return "cuda"


def _exact() -> None:
    """Have a GPU give the same numbers each time, and float32 where float32 is asked for.

    By default convolutions of float32 keep ten bits of the mantissa, and sums are taken in whatever order.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's own condition, read when it first starts
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a guard against bugs that costs a pass over memory


def nth(device: str, index: int) -> str:
    """The device of one of several workers: with several GPUs in sight, each its own."""
    import torch

    return f"cuda:{index % torch.cuda.device_count()}" if device == "cuda" else device
