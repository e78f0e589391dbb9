"""What a student costs, apart from time: its tensors, its arithmetic and its size on disk."""

from collections.abc import Callable
from io import BytesIO

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.students import Student


def of_student(student: Student, size: tuple[int, int]) -> dict:
    """Parameters, bytes and floating-point operations of one chip of `size` [y, x]."""
    chip = torch.zeros(1, student.shape.bands, *size)
    student = student.to("cpu")
    return {**of_modules(student), "flops": flops(lambda: student(chip))}


def of_modules(*modules: torch.nn.Module) -> dict:
    """How many parameters, and bytes of all tensors as torch saves them."""
    held = BytesIO()
    torch.save([module.state_dict() for module in modules], held)
    return {"parameters": sum(one.numel() for module in modules for one in module.parameters()), "bytes": held.tell()}


@torch.no_grad()
def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of products and convolutions, two for each multiplication and its sum."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
