"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input. The message is one paragraph: what was given, what exists, what to do."""
