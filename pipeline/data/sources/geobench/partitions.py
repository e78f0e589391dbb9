"""Read the JSON files of a set (partitions, labels and band statistics), and check its band means.

The means are compared with published ones, to detect bands in another order.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.data.sources.geobench.catalog import GeoBenchSet
from pipeline.errors import UserError

# Our name of each split of a partition file.
SPLITS = {"train": "train", "valid": "val", "test": "test"}
# In characters; file systems allow at most 255 bytes.
MAX_NAME_LENGTH = 200
# In characters: longer values of a file are cut in messages.
_SHOWN_LENGTH = 60
# In standard deviations: means of other samples of the same pixels differ from the published ones by less.
MEAN_TOLERANCE = 0.2
_HINT = "If the files are right, set check_means: false in the options of the dataset."


# JSON files


class Partition(NamedTuple):
    """Sample names, the split of each, and a description of each dropped entry."""

    names: list[str]
    splits: list[str]
    dropped: list[str]


def read_partition(path: Path, skip_bad: bool) -> Partition:
    """Return the samples of a partition file; `skip_bad` drops repeated ones instead of raising an error.

    Raises:
        UserError: there is no such partition, it has other splits, or it lists a sample twice.
    """
    if not path.is_file():
        partitions = sorted(
            file.name.removesuffix("_partition.json") for file in path.parent.glob("*_partition.json")
        )
        raise UserError(
            f"There is no {path}. Partitions in this folder: {', '.join(partitions) or 'none'}.",
            key="partition", value=path.name.removesuffix("_partition.json"), allowed=partitions, path=path,
        )  # fmt: skip
    names_of_split = _read_json(path)
    if not isinstance(names_of_split, dict) or set(names_of_split) != set(SPLITS):
        present = list(map(str, names_of_split)) if isinstance(names_of_split, dict) else []
        raise UserError(
            f"{path} must list train, valid and test. It lists: {', '.join(present) or 'none of them'}.",
            value=present, allowed=SPLITS, path=path,
        )  # fmt: skip
    split_of, dropped = {}, []
    for split, names in names_of_split.items():
        for name in _check_sample_names(path, split, names):
            if name in split_of and not skip_bad:
                splits = f"twice in {split}" if split_of[name] == split else f"in {split_of[name]} and in {split}"
                raise UserError(
                    f"{path} lists the sample {name} {splits}. List it in one split, once, or set skip_bad: true.",
                    key=split, value=name, path=path,
                )  # fmt: skip
            if name in split_of:
                dropped.append(f"{name} in {split}")
            split_of.setdefault(name, split)
    return Partition(list(split_of), [SPLITS[split] for split in split_of.values()], dropped)


def read_labels(folder: Path, spec: GeoBenchSet) -> Mapping[str, int | tuple[int, ...]] | None:
    """Return the label by sample name; None for segmentation, or if there is no file.

    label_map.json contains the sample names of each class; label_stats.json (multi-label) the zeros and ones of each
    sample.

    Raises:
        UserError: the file has another structure, an invalid label, or a sample twice.
    """
    task = spec.task_class
    path = folder / ("label_stats.json" if task.is_multilabel else "label_map.json")
    if task.is_dense or not path.exists():
        return None
    content = _read_json(path)
    if not isinstance(content, dict) or not all(isinstance(values, list) for values in content.values()):
        raise UserError(f"{path} does not have GEO-Bench's structure: every entry must be a list.", path=path)
    return _multi_hot_labels(path, content) if task.is_multilabel else _class_labels(path, content, spec)


def read_published_stats(
    folder: Path, spec: GeoBenchSet, keys: Sequence[str], scale: float
) -> dict[str, tuple[float, float] | None]:
    """Return the published mean and standard deviation of each key, times `scale`; None if there are none.

    If nothing is published, those of band_stats.json in the set's folder; UserError if it has another structure.
    """
    stats = dict(spec.published_stats)
    path = folder / "band_stats.json"
    if not stats and path.exists():
        content = _read_json(path)
        if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
            raise UserError(f"{path} does not have GEO-Bench's structure: every entry must be an object.", path=path)
        pairs = {key: (entry.get("mean"), entry.get("std")) for key, entry in content.items()}
        stats = {key: pair for key, pair in pairs.items() if all(map(_is_finite, pair)) and pair[1] > 0}
    return {key: (stats[key][0] * scale, stats[key][1] * scale) if key in stats else None for key in keys}


def _multi_hot_labels(path: Path, content: dict[str, list]) -> dict[str, tuple[int, ...]]:
    for name, values in content.items():
        if invalid := [value for value in values if value not in (0, 1)]:
            raise UserError(
                f"{path} has the value {str(invalid[0])[:_SHOWN_LENGTH]} for the sample {name}. Multi-label values "
                "must be 0 or 1.",
                key=name, value=invalid[0], allowed=(0, 1), path=path,
            )  # fmt: skip
    return {name: tuple(map(int, values)) for name, values in content.items()}


def _class_labels(path: Path, content: dict[str, list], spec: GeoBenchSet) -> dict[str, int]:
    # Keys are class indices; their order in the file has no meaning.
    class_of_key = {str(index): index for index in range(len(spec.classes))}
    if invalid := [key for key in content if key not in class_of_key]:
        raise UserError(
            f"{path} has the class {invalid[0][:_SHOWN_LENGTH]!r}. {spec.name} has the classes 0 to "
            f"{len(spec.classes) - 1}.",
            value=invalid[0], allowed=class_of_key, path=path,
        )  # fmt: skip
    labels: dict[str, int] = {}
    for key, names in content.items():
        for name in _check_sample_names(path, key, names):
            if name in labels:
                raise UserError(f"{path} lists the sample {name} more than once.", value=name, path=path)
            labels[name] = class_of_key[key]
    return labels


def _check_sample_names(path: Path, key: str, names: object) -> list[str]:
    """Return the sample names under a key; refuse names that are not plain file names."""
    if not isinstance(names, list):
        raise UserError(
            f"{path} must have a list of sample names under {key}. It has {str(names)[:_SHOWN_LENGTH]}.",
            key=key, value=names, path=path,
        )  # fmt: skip
    for name in names:
        printable = isinstance(name, str) and 0 < len(name) <= MAX_NAME_LENGTH and name.isprintable()
        if not printable or {"/", "\\"} & set(name):
            raise UserError(
                f"{path} has the entry {str(name)[:_SHOWN_LENGTH]!r} under {key}, which is not a sample name. Names "
                f"have 1 to {MAX_NAME_LENGTH} printable characters without slashes.",
                key=key, value=name, path=path,
            )  # fmt: skip
    return names


def _read_json(path: Path):
    """Read a JSON file; refuse objects that contain a key twice."""
    try:
        return json.loads(path.read_text(), object_pairs_hook=_object_without_repeated_keys)
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not a readable JSON file ({error}).", path=path) from None


def _object_without_repeated_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = [key for key, _ in pairs]
    if len(keys) != len(set(keys)):
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r:.80} occurs twice")
    return dict(pairs)


def _is_finite(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


# Band means


@dataclass(frozen=True)
class BandMeanCheck:
    """Check of all band means of a set against published statistics.

    Attributes:
        set_name: for messages.
        published: mean and standard deviation by key; None where nothing is published.
        min_separation: a swap of two bands is detected if their published means differ by more than this, in
            standard deviations.
    """

    set_name: str
    published: Mapping[str, tuple[float, float] | None]
    min_separation: float

    def __call__(self, means: np.ndarray) -> None:
        """Raise UserError if a mean, of (band,), deviates from the published one, or two are swapped."""
        mean_of = dict(zip(self.published, map(float, means), strict=True))
        published = {key: stats for key, stats in self.published.items() if stats}
        for key, (expected, std) in published.items():
            if abs(mean_of[key] - expected) > MEAN_TOLERANCE * std:
                raise UserError(
                    f"{self.set_name}: the mean of '{key}' is {mean_of[key]:.6g}, but the published mean is "
                    f"{expected:.6g} (standard deviation {std:.6g}). These are not the released files, or their "
                    f"bands are in another order. {_HINT}",
                    key=key, value=mean_of[key],
                )  # fmt: skip
        for (key_a, (expected_a, std_a)), (key_b, (expected_b, std_b)) in itertools.combinations(
            published.items(), 2
        ):
            mean_a, mean_b = mean_of[key_a], mean_of[key_b]
            separated = abs(expected_a - expected_b) > self.min_separation * math.sqrt(std_a * std_b)
            deviation = abs(mean_a - expected_a) + abs(mean_b - expected_b)
            swapped_deviation = abs(mean_a - expected_b) + abs(mean_b - expected_a)
            if separated and 2 * swapped_deviation < deviation:
                raise UserError(
                    f"{self.set_name}: the means of '{key_a}' and '{key_b}' are {mean_a:.6g} and {mean_b:.6g}, but "
                    f"the published means are {expected_a:.6g} and {expected_b:.6g}. The two bands seem to be "
                    f"swapped. {_HINT}",
                    key=key_a, value=mean_a,
                )  # fmt: skip
