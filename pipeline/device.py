"""Choice of the compute device."""

import torch

from pipeline.errors import UserError


def resolve_device(requested: str) -> str:
    """Return `cpu` or `cuda` for `compute.device`; on a GPU, disable TF32 convolutions.

    Raises:
        UserError: `cuda` is requested and torch finds no GPU.
    """
    available = torch.cuda.is_available()
    if requested == "cuda" and not available:
        raise UserError(
            "compute.device is 'cuda', but torch finds no CUDA device. Set compute.device to 'auto' or 'cpu', or run "
            "on a machine where `nvidia-smi` lists a GPU.",
            key="compute.device", value=requested, allowed=("auto", "cpu"),
        )  # fmt: skip
    if not available or requested == "cpu":
        return "cpu"
    disable_tf32()
    return "cuda"


def disable_tf32() -> None:
    """Compute float32 convolutions in float32: by default cuDNN keeps ten bits of the mantissa."""
    torch.backends.cudnn.allow_tf32 = False


def device_for_rank(device: str, rank: int) -> str:
    """Return the device of one of several workers on a machine: one GPU each, in turn."""
    return f"cuda:{rank % torch.cuda.device_count()}" if device == "cuda" else device
