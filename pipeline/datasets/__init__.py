"""One file a source: raw files → images. A source is looked up by its file's name.

A source defines `ARCHIVE`, `BANDS` and `prepare(raw, dataset) -> Images`.
"""

import importlib
import pkgutil

from pipeline.errors import UserError


def source(name: str):
    """The module of a source.

    Raises:
        UserError: no such file here; the message lists those that are.
    """
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    if name not in known:
        raise UserError(f"There is no source '{name}'. Sources in pipeline/datasets: {', '.join(known)}.")
    return importlib.import_module(f"{__name__}.{name}")
