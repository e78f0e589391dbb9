"""The error that a user is meant to read."""

from cache.errors import InputError


class UserError(InputError):
    """Bad input: a parameter, an option or a file. Its fields (`key`, `value`, `allowed`, `path`) say where."""
