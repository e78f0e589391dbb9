"""Checkpoints of tensors: read without running anything they hold, and loaded with every name accounted for."""

import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from pipeline.errors import UserError


def read_checkpoint(path: Path) -> dict:
    """What a checkpoint holds: tensors, numbers, text and containers of these.

    Raises:
        UserError: damaged, not a checkpoint, or one that wants to run code.
    """
    if Path(path).suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise _unreadable(path, error) from None
    try:
        _check_sums(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        zlib.error,
        RuntimeError,
        EOFError,
        struct.error,
        AssertionError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        raise _unreadable(path, error) from None
    if not isinstance(held, Mapping) or not all(isinstance(name, str) for name in held):
        raise _unreadable(path, TypeError(f"it holds a {type(held).__name__}, not tensors by name"))
    return held


def load_strict(
    network: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    path: Path,
    allow_missing: Callable[[str], bool] = lambda name: False,
) -> None:
    """Load tensors by name: none may be left over, none may be missing but those that `may_lack` allows.

    Raises:
        UserError: names, shapes or kinds of numbers that do not fit; the message gives the first of them.
    """
    try:
        # A network's own load_state_dict may drop what it does not know and return nothing: call torch's.
        found = torch.nn.Module.load_state_dict(network, tensors, strict=False)
    except RuntimeError as error:
        reason = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise UserError(f"{path} does not fit the network: {reason}") from None
    wanted = dict(network.named_parameters())
    if odd := [name for name, value in tensors.items() if name in wanted and not value.is_floating_point()]:
        raise UserError(
            f"{path} does not fit the network: {', '.join(odd[:4])} are of whole or complex numbers. It is another "
            "model's file, or a damaged one."
        )
    lacking = [name for name in found.missing_keys if not allow_missing(name)]
    if lacking or found.unexpected_keys:
        raise UserError(
            f"{path} does not fit the network: {_some('missing', lacking)}, "
            f"{_some('unexpected', found.unexpected_keys)}. It is another model's file, or a damaged one."
        )


def strip_prefix(tensors: Mapping, prefix: str, path: Path) -> dict:
    """The tensors whose names begin with `prefix`, without it.

    Raises:
        UserError: there are none; the message says what there is.
    """
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if str(name).startswith(prefix)}
    if not found:
        raise UserError(f"{path} holds no tensors named {prefix}…; it has {', '.join(map(str, list(tensors)[:4]))}.")
    return found


def _check_sums(path: Path) -> None:
    """Of the files in a checkpoint that is an archive: torch reads them without a look."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for one in archive.infolist():
                if one.CRC:  # torch can be told to compute none
                    _read_through(archive, one)


def _read_through(archive: zipfile.ZipFile, one: zipfile.ZipInfo) -> None:
    with archive.open(one) as file:
        while file.read(2**20):
            pass


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:160] or "it ends too early"
    if isinstance(error, pickle.UnpicklingError):  # torch's words are advice to run what is in it
        wants = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = (
            f"it wants to run {wants[1]}, and nothing in it was run" if wants else "it is no file of tensors alone"
        )
    return UserError(
        f"{path} is not a checkpoint of tensors, or is damaged, and is not used ({reason}). Fetch it again, or take "
        "one that holds tensors alone."
    )


def _some(what: str, names) -> str:
    names = list(names)
    return (
        f"{what} {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        if names
        else f"none {what}"
    )
