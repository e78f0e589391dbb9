"""The lists beside a set's files: partitions, labels and statistics."""

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.datasets.geobench.declare import GeoBenchSet
from pipeline.errors import UserError

# Splits by their names in the files.
SPLITS = {"train": "train", "valid": "val", "test": "test"}


def partition(path: Path, skip_bad: bool) -> tuple[list[str], list[str], list[str]]:
    """Names and splits of a partition file's samples, and mentions that were dropped.

    Raises:
        UserError: no such partition, other splits, or a sample that is listed twice.
    """
    try:
        listed = json.loads(path.read_text())
    except FileNotFoundError:
        files = sorted(path.parent.glob("*_partition.json"))
        known = ", ".join(one.name.removesuffix("_partition.json") for one in files)
        raise UserError(f"There is no {path}. Partitions there: {known or 'none'}.") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON file ({error}).") from None
    if not isinstance(listed, dict) or set(listed) != set(SPLITS):
        there = ", ".join(map(str, listed)) if isinstance(listed, dict) else "none of them"
        raise UserError(f"{path} must list train, valid and test; it lists {there}.")
    home, dropped = {}, []
    for split, names in listed.items():
        for name in _plain(path, split, names):
            if name in home and not skip_bad:
                where = f"twice in {split}" if home[name] == split else f"in {home[name]} and in {split}"
                raise UserError(f"{path} lists the sample {name} {where}; a sample may be in one split, once.")
            if name in home:
                dropped.append(f"{name} of {split}")
            home.setdefault(name, split)
    return list(home), [SPLITS[split] for split in home.values()], dropped


def _plain(path: Path, split: str, names) -> list[str]:
    """The names, which are those of files in the folder and nowhere else."""
    if not isinstance(names, list):
        raise UserError(f"{path} must list the names of samples in {split}; it has {str(names)[:60]}.")
    for name in names:
        if not isinstance(name, str) or not name or {"/", "\\", "\0"} & set(name):
            raise UserError(f"{path} lists {str(name)[:60]!r} in {split}, which is no name of a sample.")
    return names


def labels(folder: Path, declared: GeoBenchSet) -> dict | None:
    """Labels by sample from label_map.json (samples by class) or label_stats.json (zeros and ones by sample)."""
    if declared.task == "segmentation":
        return None
    path = folder / ("label_stats.json" if declared.task == "multilabel" else "label_map.json")
    if not path.exists():
        return None
    try:
        listed = json.loads(path.read_text())
        if declared.task == "multilabel":
            return {name: tuple(int(one) for one in values) for name, values in listed.items()}
        # Keys are class indices; their order in the file means nothing.
        pairs = [(name, int(label)) for label, names in listed.items() for name in names]
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not laid out as GEO-Bench's ({error}).") from None
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, label in pairs if found[name] != label or pairs.count((name, label)) > 1)
        raise UserError(f"{path} lists the sample {twice} more than once.")
    return found


def published(
    folder: Path, declared: GeoBenchSet, keys: Sequence[str], scale: float
) -> dict[str, tuple[float, float] | None]:
    """Published mean and standard deviation of each key, else those that come with the files, times `scale`."""
    known = dict(declared.published)
    if not known and (folder / "band_stats.json").exists():
        path = folder / "band_stats.json"
        try:
            pairs = {key: (one.get("mean"), one.get("std")) for key, one in json.loads(path.read_text()).items()}
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} is not laid out as GEO-Bench's ({error}).") from None
        known = {key: pair for key, pair in pairs.items() if all(isinstance(one, float | int) for one in pair)}
    return {key: (known[key][0] * scale, known[key][1] * scale) if key in known else None for key in keys}
