from contextlib import suppress

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.backbones import checkpoints
from pipeline.errors import UserError
from tests.errors import raises


def test_read_checkpoint_with_code_or_without_names_is_refused_and_runs_nothing(tmp_path):
    class CodeOnLoad:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"weight": CodeOnLoad()}, tmp_path / "evil.pt")
    with raises(UserError, "io.open", path=tmp_path / "evil.pt"):
        checkpoints.read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    torch.save({0: torch.zeros(1)}, tmp_path / "numbered.pt")
    with raises(UserError, path=tmp_path / "numbered.pt"):
        checkpoints.read_checkpoint(tmp_path / "numbered.pt")


@pytest.mark.parametrize(("name", "save"), [("x.pt", torch.save), ("x.safetensors", save_file)])
def test_read_checkpoint_truncated_or_with_a_flipped_bit_is_refused(tmp_path, name, save):
    path = tmp_path / name
    save({"a": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    assert torch.equal(checkpoints.read_checkpoint(path)["a"], torch.zeros(1000))
    for n_bytes in (0, 2000):
        path.write_bytes(content[:n_bytes])
        with raises(UserError, path, path=path):
            checkpoints.read_checkpoint(path)
    if save is torch.save:  # safetensors has no checksums
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert torch.load(path, weights_only=True)["a"].any()  # another number without an error
        with raises(UserError, "CRC-32", path=path):
            checkpoints.read_checkpoint(path)


def test_load_strict_accounts_for_every_name_shape_and_dtype(tmp_path):
    network = torch.nn.Linear(2, 3)
    tensors = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    only_weight, unexpected = {"weight": tensors["weight"]}, {f"b{i}": torch.ones(1) for i in range(1, 6)}
    checkpoints.load_strict(network, tensors, tmp_path)
    assert network.weight.sum() == 6
    checkpoints.load_strict(network, only_weight, tmp_path, allow_missing=lambda name: name == "bias")
    with raises(UserError, "bias", value=["bias"], path=tmp_path):
        checkpoints.load_strict(network, only_weight, tmp_path)
    with raises(UserError, "b1, b2, b3, b4", value=list(unexpected), path=tmp_path):
        checkpoints.load_strict(network, tensors | unexpected, tmp_path)
    with raises(UserError, "bias", path=tmp_path):
        checkpoints.load_strict(network, {**tensors, "bias": torch.ones(4)}, tmp_path)
    integers = {"weight": torch.ones(3, 2, dtype=torch.int32), "bias": torch.ones(3).half()}
    with raises(UserError, value=["weight"], path=tmp_path):
        checkpoints.load_strict(network, integers, tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_read_checkpoint_of_the_old_format_refuses_or_survives_any_damage(tmp_path):
    """The format before zip archives has no checksums, and its reader fails in many ways."""
    path = tmp_path / "old.pth"
    torch.save({"a": torch.zeros(10), "b": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    content, random = path.read_bytes(), np.random.default_rng(0)
    for number in range(100):
        damaged = bytearray(content[: random.integers(len(content))] if number % 2 else content)
        if damaged:
            damaged[random.integers(len(damaged))] = random.integers(256)
        path.write_bytes(damaged)
        with suppress(UserError):
            checkpoints.read_checkpoint(path)


def test_strip_prefix_without_such_names_is_refused():
    assert checkpoints.strip_prefix({"a.b": 1, "c": 2}, "a.", "x.pt") == {"b": 1}
    with raises(UserError, "c", path="x.pt", value=["c"], allowed=("a.",)):
        checkpoints.strip_prefix({"c": 2}, "a.", "x.pt")
