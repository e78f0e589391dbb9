"""Which device to compute on."""

from pipeline.errors import UserError


def resolve_device(wanted: str) -> str:
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
    """Have a GPU compute float32 where it is asked for: by default convolutions keep ten bits of the mantissa."""
    import torch

    torch.backends.cudnn.allow_tf32 = False


def device_for_rank(device: str, index: int) -> str:
    """The device of one of several workers: with several GPUs in sight, each its own."""
    import torch

    return f"cuda:{index % torch.cuda.device_count()}" if device == "cuda" else device
