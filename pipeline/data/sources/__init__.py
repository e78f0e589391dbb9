"""One file, or folder, a source: raw files → images. A source is looked up by its name.

A source defines `prepare(raw, dataset)`, which returns `Images` or a `Stream` of them, and where its raw files come
from: a pinned `ARCHIVE`, or `fetch(dataset, params)`, which leaves them where they are and returns what is to be
remembered of them. `NEEDS` are the keys that its block in params.yaml must have, beside `source`, and `Options`, a
frozen record, the type of its `options`.
"""

import importlib
import pkgutil

from pipeline.config import DatasetConfig, parse
from pipeline.errors import UserError


def get_source(name: str):
    """The module of a source.

    Raises:
        UserError: no such file here; the message lists those that are.
    """
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    if name not in known:
        raise UserError(f"There is no source '{name}'. Sources in pipeline/data/sources: {', '.join(known)}.")
    return importlib.import_module(f"{__name__}.{name}")


def validate(name: str, dataset: DatasetConfig) -> None:
    """Check a block of params.yaml against what its source takes.

    Raises:
        UserError: no such source, a key that it needs or does not know, or options that do not fit together.
    """
    module = get_source(dataset.source)
    needs, takes = getattr(module, "NEEDS", ()), getattr(module, "TAKES", ())
    for key in ("task", "chip", "block", "splits"):
        given = bool(getattr(dataset, key))
        if key in needs and not given:
            raise UserError(f"datasets.{name} lacks: {key}. Source '{dataset.source}' needs {', '.join(needs)}.")
        if given and key not in (*needs, *takes):
            raise UserError(f"datasets.{name} has {key}, which source '{dataset.source}' does not take. Remove it.")
    parse_options(dataset, f"datasets.{name}")


def parse_options(dataset: DatasetConfig, where: str = "datasets"):
    """The source's options as its own record, or None for a source that has none.

    Raises:
        UserError: an unknown or missing option, or a value of another type.
    """
    module = get_source(dataset.source)
    if not hasattr(module, "Options"):
        if dataset.options:
            raise UserError(f"{where} has options, but source '{dataset.source}' has none. Remove them.")
        return None
    made = parse(module.Options, dataset.options, f"{where}.options")
    if hasattr(module, "check"):
        module.check(made, dataset, where)
    return made
