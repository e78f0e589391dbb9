"""Sources of images: one module or package each, which turns raw files into images.

A source is a file `pipeline/data/sources/<name>.py`, or a module given to `register`, that satisfies the protocol
`Source`. `datasets.*.source` in params.yaml is its name.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Protocol, cast

from pipeline.bands import Band
from pipeline.config import DatasetConfig, Params, parse
from pipeline.data.download import PinnedWheel
from pipeline.data.image_store import ImageDataset, LazyImageDataset
from pipeline.errors import UserError

_registered: dict[str, ModuleType] = {}


@dataclass(frozen=True)
class DatasetSize:
    """Size of a dataset before it is prepared, as far as known.

    Attributes:
        image_size: height and width in pixels.
        bytes_per_image: of one image and its mask in the store; 0 if the dataset is prepared already.
        images_per_second: that one process reads; None if unknown.
    """

    n_samples: int
    bands: tuple[Band, ...]
    task: str
    n_classes: int
    image_size: tuple[int, int]
    bytes_per_image: int
    images_per_second: float | None = None


class Source(Protocol):
    """Interface of a source.

    A module must define `prepare`, and `ARCHIVE` or `fetch`. The other members have the defaults below.

    Attributes:
        ARCHIVE: the pinned file with the raw data; None if `fetch` finds or downloads them.
        REQUIRED_KEYS: keys of its block in params.yaml, among `task`, `chip`, `block` and `splits`, that it needs.
        OPTIONAL_KEYS: keys among these that it accepts. Any other of them is refused.
        Options: the frozen dataclass of `datasets.*.options`, or None. If it has a field `skip_bad: bool`, unreadable
            samples can be skipped.
    """

    ARCHIVE: PinnedWheel | None = None
    REQUIRED_KEYS: tuple[str, ...] = ()
    OPTIONAL_KEYS: tuple[str, ...] = ()
    Options: type | None = None

    @staticmethod
    def prepare(raw: Path, dataset: DatasetConfig) -> ImageDataset | LazyImageDataset:
        """Return the dataset, from the unpacked `ARCHIVE`, or source.json with what `fetch` returned."""
        ...

    @staticmethod
    def fetch(dataset: DatasetConfig, params: Params) -> Mapping[str, object]:
        """Find or download raw files that stay in their own folder; return the record for source.json."""
        return {}

    @staticmethod
    def validate_options(options: object, dataset: DatasetConfig, key: str) -> None:
        """Raise UserError, with `key`, for options that do not fit together."""

    @staticmethod
    def estimate_size(dataset: DatasetConfig, params: Params) -> tuple[DatasetSize, int] | None:
        """Return the size of the prepared dataset and the bytes still to download; None if unknown."""
        return None


_MEMBERS = ("ARCHIVE", "REQUIRED_KEYS", "OPTIONAL_KEYS", "Options", "prepare", "fetch", "validate_options",
            "estimate_size")  # fmt: skip


def register(name: str, module: ModuleType) -> None:
    """Add a source from outside this package, with its name in params.yaml."""
    if name in source_names():
        raise UserError(f"Source '{name}' exists already. Choose another name.", key="source", value=name)
    if "prepare" not in vars(module) or not {"ARCHIVE", "fetch"} & set(vars(module)):
        raise UserError(
            f"{module.__name__} is not a source: it must define prepare, and ARCHIVE or fetch.",
            key="source", value=name, allowed=_MEMBERS,
        )  # fmt: skip
    _registered[name] = module


def source_names() -> list[str]:
    """Names of all sources: the modules of this package and the registered ones."""
    return [*(module.name for module in pkgutil.iter_modules(__path__)), *_registered]


def source_module(name: str) -> ModuleType:
    """Import the module of a source; UserError if there is none of this name."""
    if name not in source_names():
        raise UserError(
            f"There is no source '{name}'. Sources in pipeline/data/sources: {', '.join(source_names())}.",
            key="source", value=name, allowed=source_names(),
        )  # fmt: skip
    return _registered.get(name) or importlib.import_module(f"{__name__}.{name}")


def get_source(name: str) -> Source:
    """Return a source by name, with the defaults of `Source` for what its module does not define."""
    module = source_module(name)
    members = {member: vars(module).get(member, getattr(Source, member)) for member in _MEMBERS}
    return cast(Source, SimpleNamespace(**members))


def validate(name: str, dataset: DatasetConfig) -> None:
    """Check a dataset's block of params.yaml against the keys and options of its source."""
    source = get_source(dataset.source)
    allowed = (*source.REQUIRED_KEYS, *source.OPTIONAL_KEYS)
    for key in ("task", "chip", "block", "splits"):
        is_given = bool(getattr(dataset, key))
        if key in source.REQUIRED_KEYS and not is_given:
            raise UserError(
                f"datasets.{name} lacks: {key}. Source '{dataset.source}' needs {', '.join(source.REQUIRED_KEYS)}.",
                key=f"datasets.{name}.{key}", allowed=source.REQUIRED_KEYS,
            )  # fmt: skip
        if is_given and key not in allowed:
            raise UserError(
                f"datasets.{name} has {key}, which source '{dataset.source}' does not use. Remove it.",
                key=f"datasets.{name}.{key}", allowed=allowed,
            )  # fmt: skip
    parse_options(dataset, f"datasets.{name}")


def parse_options(dataset: DatasetConfig, key: str = "datasets"):
    """Parse a dataset's options into its source's `Options`; None if the source has none."""
    source = get_source(dataset.source)
    if source.Options is None:
        if dataset.options:
            raise UserError(
                f"{key} has options, but source '{dataset.source}' has none. Remove them.",
                key=f"{key}.options", value=dict(dataset.options),
            )  # fmt: skip
        return None
    options = parse(source.Options, dataset.options, f"{key}.options")
    source.validate_options(options, dataset, key)
    return options
