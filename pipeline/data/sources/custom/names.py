"""Names of classes, which people and programs write in several ways."""

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal

from pipeline.errors import UserError

_NUMBER = re.compile(r"[+-]?\d{1,30}(\.\d{0,30})?", re.ASCII)


def unique_class_names(names: Iterable[str], whose: str) -> list[str]:
    """Names of classes in order.

    Raises:
        UserError: two differ in capitals alone, or are one number, and so are surely one.
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        other = found.setdefault(_normalize(name), name)
        if other != name:
            raise UserError(
                f"{whose} have the classes '{other}' and '{name}', which differ in capitals alone, or in how a "
                "number is written. Write them alike, or, if they are two, list all classes in the options."
            )
    return list(found.values())


def _normalize(name: str) -> str:
    """A name without capitals, and a number as it is written shortest."""
    return f"{Decimal(name).normalize():f}" if _NUMBER.fullmatch(name) else name.casefold()


def normalize_unicode(name: str) -> str:
    """One way to write a name: macOS and some editors take letters and their accents apart."""
    return unicodedata.normalize("NFC", name.strip())
