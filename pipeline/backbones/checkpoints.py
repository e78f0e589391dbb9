"""Checkpoints: read without running the code in them, and loaded only if every tensor fits."""

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.errors import UserError

_MAX_NAMES = 4


def read_checkpoint(path: Path) -> Mapping:
    """Read tensors, numbers, text and containers of these from safetensors or one of torch's formats.

    Raises UserError: a damaged file, one that is not a checkpoint, or one that would run code.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        _verify_checksums(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's readers fail in many ways
        raise _unreadable(path, error) from None
    if not isinstance(checkpoint, Mapping) or not all(isinstance(name, str) for name in checkpoint):
        raise _unreadable(path, TypeError(f"it contains a {type(checkpoint).__name__}, not tensors by name"))
    return checkpoint


def load_strict(
    network: torch.nn.Module, tensors: Mapping[str, torch.Tensor], path: Path,
    allow_missing: Callable[[str], bool] = lambda name: False,
) -> None:  # fmt: skip
    """Load tensors into a network by name; every name and shape must fit, unless it may be missing.

    Raises UserError: missing or unexpected names, other shapes, or integer or complex numbers.
    """
    try:
        # A network may override load_state_dict, ignore unknown names and return nothing: call torch's.
        result = torch.nn.Module.load_state_dict(network, tensors, strict=False)
    except RuntimeError as error:
        reason = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise UserError(f"{path} does not fit the network: {reason}.", path=path) from None
    parameters = dict(network.named_parameters())
    names = {
        "not real numbers": [n for n, value in tensors.items() if n in parameters and not value.is_floating_point()],
        "missing": [name for name in result.missing_keys if not allow_missing(name)],
        "unexpected": result.unexpected_keys,
    }
    if any(names.values()):
        problems = "; ".join(f"{problem}: {_first_names(listed)}" for problem, listed in names.items() if listed)
        raise UserError(
            f"{path} does not fit the network ({problems}). It is the file of another model, or it is damaged.",
            path=path, value=[name for listed in names.values() for name in listed],
        )  # fmt: skip


def strip_prefix(tensors: Mapping, prefix: str, path: Path) -> dict:
    """Select the tensors whose names begin with `prefix`, and remove it; UserError if there are none."""
    selected = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if str(name).startswith(prefix)}
    if not selected:
        names = [str(name) for name in tensors]
        raise UserError(
            f"{path} contains no tensors named {prefix}… but {_first_names(names)}. It is the file of another model.",
            path=path, value=names, allowed=(prefix,),
        )  # fmt: skip
    return selected


def _verify_checksums(path: Path) -> None:
    """Verify the CRC-32 of every file in a checkpoint that is a zip archive; torch does not."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.CRC:  # torch can write archives without checksums
                continue
            with archive.open(member) as file:
                while file.read(2**20):  # zipfile raises BadZipFile at the end of a damaged member
                    pass


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:160] or "it ends too early"
    if isinstance(error, pickle.UnpicklingError):  # torch's message recommends to run the code
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it would run {code[1]}; nothing was run" if code else "it contains more than tensors"
    return UserError(
        f"{path} is not a checkpoint of tensors, or it is damaged ({reason}). Fetch it again, or use a file that "
        "contains tensors only.",
        path=path,
    )


def _first_names(names: Sequence[str]) -> str:
    """Return `a, b, c, d and 2 more`."""
    suffix = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + suffix
