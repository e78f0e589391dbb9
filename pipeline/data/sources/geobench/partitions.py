"""The lists beside a set's files: partitions, labels and statistics."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.sources.geobench.spec import GeoBenchSet
from pipeline.errors import UserError

# Splits by their names in the files.
SPLITS = {"train": "train", "valid": "val", "test": "test"}

# Letters of a sample's name; file systems take no more than 255 bytes.
_LONGEST = 200


def read_partition(path: Path, skip_bad: bool) -> tuple[list[str], list[str], list[str]]:
    """Names and splits of a partition file's samples, and mentions that were dropped.

    Raises:
        UserError: no such partition, other splits, or a sample that is listed twice.
    """
    if not path.is_file():
        files = sorted(path.parent.glob("*_partition.json"))
        known = ", ".join(one.name.removesuffix("_partition.json") for one in files)
        raise UserError(f"There is no {path}. Partitions there: {known or 'none'}.")
    listed = _json(path)
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
        plain = isinstance(name, str) and 0 < len(name) <= _LONGEST and name.isprintable()
        if not plain or {"/", "\\"} & set(name):
            raise UserError(f"{path} lists {str(name)[:60]!r} in {split}, which is no name of a sample.")
    return names


def _json(path: Path):
    """A file's JSON, in which no name is there twice."""

    def once(pairs):
        names = [name for name, _ in pairs]
        if len(names) != len(set(names)):
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r:.80} is there twice")
        return dict(pairs)

    try:
        return json.loads(path.read_text(), object_pairs_hook=once)
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is no JSON file that can be read ({error}).") from None


def _finite(value) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def read_labels(folder: Path, declared: GeoBenchSet) -> dict | None:
    """Labels by sample from label_map.json (samples by class) or label_stats.json (zeros and ones by sample)."""
    if declared.task == "segmentation":
        return None
    path = folder / ("label_stats.json" if declared.task == "multilabel" else "label_map.json")
    if not path.exists():
        return None
    listed = _json(path)
    if not isinstance(listed, dict) or not all(isinstance(one, list) for one in listed.values()):
        raise UserError(f"{path} is not laid out as GEO-Bench's: it must have a list for each of its names.")
    if declared.task == "multilabel":
        for name, values in listed.items():
            if strange := [one for one in values if one not in (0, 1)]:
                raise UserError(
                    f"{path} has {str(strange[0])[:60]} for the sample {name}; labels are zeros and ones."
                )
        return {name: tuple(map(int, values)) for name, values in listed.items()}
    # Keys are class indices; their order in the file means nothing.
    classes = {str(index): index for index in range(len(declared.classes))}
    if strange := [label for label in listed if label not in classes]:
        raise UserError(
            f"{path} has the class {strange[0][:60]!r}; {declared.name} has the classes 0 to {len(classes) - 1}."
        )
    pairs = [(name, classes[label]) for label, names in listed.items() for name in _plain(path, label, names)]
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, label in pairs if found[name] != label or pairs.count((name, label)) > 1)
        raise UserError(f"{path} lists the sample {twice} more than once.")
    return found


def read_published_stats(
    folder: Path, declared: GeoBenchSet, keys: Sequence[str], scale: float
) -> dict[str, tuple[float, float] | None]:
    """Published mean and standard deviation of each key, else those that come with the files, times `scale`."""
    known = dict(declared.published_stats)
    if not known and (folder / "band_stats.json").exists():
        path = folder / "band_stats.json"
        stats = _json(path)
        if not isinstance(stats, dict) or not all(isinstance(one, dict) for one in stats.values()):
            raise UserError(f"{path} is not laid out as GEO-Bench's: it must have statistics for each of its names.")
        pairs = {key: (one.get("mean"), one.get("std")) for key, one in stats.items()}
        known = {key: pair for key, pair in pairs.items() if all(map(_finite, pair)) and pair[1] > 0}
    return {key: (known[key][0] * scale, known[key][1] * scale) if key in known else None for key in keys}
