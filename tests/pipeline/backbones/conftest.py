import pytest
import torch


@pytest.fixture(autouse=True)
def full_precision():
    """Importing terratorch, as some tests do, lowers torch's float32 precision for the whole process."""
    torch.set_float32_matmul_precision("highest")
