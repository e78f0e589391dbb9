"""Errors with fields that locate the mistake."""

from collections.abc import Iterable
from pathlib import Path


class InputError(Exception):
    """Bad input or a bad file. Its message states the mistake, allowed or present values, and a remedy.

    Attributes:
        key: the parameter, option, column or array at fault, such as `heads.levels`; None if there is none.
        value: its value.
        allowed: the values that are allowed or present.
        path: the file or folder at fault.
    """

    def __init__(
        self,
        message: str,
        *,
        key: str | None = None,
        value: object = None,
        allowed: Iterable | None = None,
        path: Path | str | None = None,
    ):
        super().__init__(message)
        self.key, self.value = key, value
        self.allowed = None if allowed is None else tuple(allowed)
        self.path = None if path is None else Path(path)


class StoreError(InputError):
    """A store that is absent, unfinished, damaged or unsuitable for its reader."""
