"""Assert the fields of an error instead of the wording of its message."""

from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def raises(error_type: type[Exception], *mentions: object, **fields: object):
    """Expect an error with these fields, whose message contains every value of `mentions`.

    Args:
        mentions: values (names, numbers, paths) that the user must be shown; never phrases.
        fields: `key`, `value`, `allowed` or `path`; `path` is compared as a Path, `allowed` as a tuple.
    """
    with pytest.raises(error_type) as info:
        yield info
    for name, expected in fields.items():
        actual = getattr(info.value, name)
        if name == "path":
            expected, actual = Path(expected), actual and Path(actual)
        elif name == "allowed":
            expected = tuple(expected)
        assert actual == expected, f"{name} of the error is {actual!r}: {info.value}"
    for value in mentions:
        assert str(value) in str(info.value), f"{value!r} is not in: {info.value}"
