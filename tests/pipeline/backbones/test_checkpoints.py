from contextlib import suppress
from warnings import catch_warnings

import numpy as np
import pytest
import torch

from pipeline.backbones import checkpoints
from pipeline.errors import UserError


def test_a_checkpoint_that_runs_code_is_refused_and_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a checkpoint of tensors.*wants to run [a-z_]*io.open, and nothing"):
        checkpoints.read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("keep", [0, 100, 2000])
def test_a_truncated_file_is_refused(tmp_path, name, keep):
    from safetensors.torch import save_file

    (save_file if name.endswith("safetensors") else torch.save)({"a": torch.zeros(1000)}, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    assert torch.equal(checkpoints.read_checkpoint(tmp_path / name)["a"], torch.zeros(1000))
    (tmp_path / name).write_bytes(whole[:keep])
    with pytest.raises(UserError, match="not a checkpoint of tensors, or is damaged"):
        checkpoints.read_checkpoint(tmp_path / name)


def test_a_flipped_bit_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.pt")
    whole = bytearray((tmp_path / "x.pt").read_bytes())
    whole[len(whole) // 2] ^= 1  # torch reads another number and says nothing
    (tmp_path / "x.pt").write_bytes(whole)
    assert torch.load(tmp_path / "x.pt", weights_only=True)["a"].any()
    with pytest.raises(UserError, match="Bad CRC-32 for file"):
        checkpoints.read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_numbers_of_another_kind_are_refused(dtype):
    whole = {"weight": torch.ones(3, 2, dtype=dtype), "bias": torch.ones(3).half()}
    with pytest.raises(UserError, match="weight are of whole or complex numbers"), catch_warnings(record=True):
        checkpoints.load_strict(torch.nn.Linear(2, 3), whole, "x.pt")


def test_names_are_accounted_for(tmp_path):
    network = torch.nn.Linear(2, 3)
    whole = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    checkpoints.load_strict(network, whole, tmp_path)
    assert network.weight.sum() == 6
    checkpoints.load_strict(network, {"weight": whole["weight"]}, tmp_path, allow_missing=lambda name: name == "bias")
    with pytest.raises(UserError, match="missing bias, none unexpected"):
        checkpoints.load_strict(network, {"weight": whole["weight"]}, tmp_path)
    with pytest.raises(UserError, match="none missing, unexpected b1, b2, b3, b4 and 1 more"):
        checkpoints.load_strict(network, {**whole, **{f"b{i}": torch.ones(1) for i in range(1, 6)}}, tmp_path)
    with pytest.raises(UserError, match="size mismatch for bias"):
        checkpoints.load_strict(network, {**whole, "bias": torch.ones(4)}, tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_damage_to_an_old_file_is_refused_or_harmless(tmp_path):
    """The format before zip archives has no checksums, and its reader fails in many ways."""
    whole = tmp_path / "whole.pth"
    torch.save({"a": torch.zeros(10), "b": torch.ones(3)}, whole, _use_new_zipfile_serialization=False)
    good, random = whole.read_bytes(), np.random.default_rng(0)
    for number in range(300):
        bad = bytearray(good[: random.integers(len(good))] if number % 2 else good)
        if bad:
            bad[random.integers(len(bad))] = random.integers(256)
        whole.write_bytes(bad)
        with suppress(UserError):
            checkpoints.read_checkpoint(whole)


def test_tensors_without_names_are_refused(tmp_path):
    torch.save({0: torch.zeros(1)}, tmp_path / "numbered.pt")
    with pytest.raises(UserError, match="not a checkpoint of tensors"):
        checkpoints.read_checkpoint(tmp_path / "numbered.pt")
