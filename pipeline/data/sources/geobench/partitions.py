"""Read the JSON files beside a set's samples, and check its band means.

The means are compared with published ones, to detect bands in another order.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
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
# In standard deviations: a swap of two bands is detected if their published means differ by more. The means in
# band_stats.json are less precise: GEO-Bench computed them from at most 1000 images.
MIN_SEPARATION, MIN_SEPARATION_BAND_STATS = 0.03, 0.1
_HINT = "If the files are right, set check_means: false in the options of the dataset."


# JSON files


class Partition(NamedTuple):
    """Sample names, the split of each, and a description of each dropped entry."""

    names: list[str]
    splits: list[str]
    dropped: list[str]


def read_partition(folder: Path, name: str, skip_bad: bool) -> Partition:
    """Return the samples of a partition; `skip_bad` drops repeated ones instead of raising an error.

    Raises UserError: there is no such partition, it has other splits, or it lists a sample twice.
    """
    path = folder / f"{name}_partition.json"
    if not path.is_file():
        existing = sorted(file.name.removesuffix("_partition.json") for file in folder.glob("*_partition.json"))
        message = f"There is no {path}. Partitions in this folder: {', '.join(existing) or 'none'}."
        raise UserError(message, key="partition", value=name, allowed=existing, path=path)
    names_of_split = _read_json(path)
    if not isinstance(names_of_split, dict) or set(names_of_split) != set(SPLITS):
        present = list(map(str, names_of_split)) if isinstance(names_of_split, dict) else []
        message = f"{path} must list train, valid and test. It lists: {', '.join(present) or 'none of them'}."
        raise UserError(message, value=present, allowed=SPLITS, path=path)
    split_of, dropped = {}, []
    for split, samples in names_of_split.items():
        for sample in _check_sample_names(path, split, samples):
            if sample not in split_of:
                split_of[sample] = split
            elif skip_bad:
                dropped.append(f"{sample} in {split}")
            else:
                splits = f"twice in {split}" if split_of[sample] == split else f"in {split_of[sample]} and in {split}"
                raise UserError(
                    f"{path} lists the sample {sample} {splits}. List it in one split, once, or set skip_bad: true.",
                    key=split, value=sample, path=path,
                )  # fmt: skip
    return Partition(list(split_of), [SPLITS[split] for split in split_of.values()], dropped)


def read_labels(folder: Path, spec: GeoBenchSet) -> Mapping[str, int | tuple[int, ...]] | None:
    """Return the label by sample name; None for segmentation, or if there is no file.

    label_map.json contains the sample names of each class; label_stats.json (multi-label) the zeros and ones of each
    sample.

    Raises UserError: the file has another structure, an invalid label, or a sample twice.
    """
    task = spec.task_class
    path = folder / ("label_stats.json" if task.is_multilabel else "label_map.json")
    if task.is_dense or not path.exists():
        return None
    content = _read_json(path)
    if not isinstance(content, dict) or not all(isinstance(values, list) for values in content.values()):
        raise UserError(f"{path} does not have GEO-Bench's structure: every entry must be a list.", path=path)
    return _multi_hot_labels(path, content) if task.is_multilabel else _class_labels(path, content, spec)


def _multi_hot_labels(path: Path, content: dict[str, list]) -> dict[str, tuple[int, ...]]:
    for name, values in content.items():
        if invalid := [value for value in values if value not in (0, 1)]:
            shown = str(invalid[0])[:_SHOWN_LENGTH]
            message = f"{path} has the value {shown} for the sample {name}. Multi-label values must be 0 or 1."
            raise UserError(message, key=name, value=invalid[0], allowed=(0, 1), path=path)
    return {name: tuple(map(int, values)) for name, values in content.items()}


def _class_labels(path: Path, content: dict[str, list], spec: GeoBenchSet) -> dict[str, int]:
    # Keys are class indices; their order in the file has no meaning.
    class_of_key = {str(index): index for index in range(len(spec.classes))}
    labels: dict[str, int] = {}
    for key, names in content.items():
        if key not in class_of_key:
            classes = f"the classes 0 to {len(spec.classes) - 1}"
            message = f"{path} has the class {key[:_SHOWN_LENGTH]!r}. {spec.name} has {classes}."
            raise UserError(message, value=key, allowed=class_of_key, path=path)
        for name in _check_sample_names(path, key, names):
            if name in labels:
                raise UserError(f"{path} lists the sample {name} more than once.", value=name, path=path)
            labels[name] = class_of_key[key]
    return labels


def _check_sample_names(path: Path, key: str, names: object) -> list[str]:
    """Return the sample names under a key; refuse names that are not plain file names."""
    if not isinstance(names, list):
        message = f"{path} must have a list of sample names under {key}. It has {str(names)[:_SHOWN_LENGTH]}."
        raise UserError(message, key=key, value=names, path=path)
    for name in names:
        printable = isinstance(name, str) and 0 < len(name) <= MAX_NAME_LENGTH and name.isprintable()
        if not printable or {"/", "\\"} & set(name):
            raise UserError(
                f"{path} has the entry {str(name)[:_SHOWN_LENGTH]!r} under {key}, which is not a sample name. Names "
                f"have 1 to {MAX_NAME_LENGTH} printable characters without slashes.",
                key=key, value=name, path=path,
            )  # fmt: skip
    return names


def read_score_range(folder: Path, spec: GeoBenchSet) -> list[float] | None:
    """Return the lowest and highest score of GEO-Bench's own runs.

    None if the release has no normalizer.json, or that lacks the set.

    Raises UserError: the file has another format.

    Source: `load_normalizer` of geobench/plot_tools.py (ServiceNow/geo-bench), which reads the file beside the sets.
    """
    path = folder.parent / "normalizer.json"
    ranges = _read_json(path) if path.is_file() else {}
    bounds = next((ranges[name] for name in spec.folder_names if name in ranges), None)
    if bounds is None:
        return None
    try:
        low, high = map(float, bounds)
        if not 0 <= low < high <= 1:
            raise ValueError
    except (TypeError, ValueError):
        message = f"{path}: {spec.name} is {bounds!r:.{_SHOWN_LENGTH}}; expected its lowest and highest score."
        raise UserError(message, key=spec.name, value=bounds, path=path) from None
    return [low, high]


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


# Band means


def make_mean_check(
    folder: Path, spec: GeoBenchSet, keys: Sequence[str], scale: float
) -> Callable[[np.ndarray], None] | None:
    """Make a check of a set's band means, in units of `scale` times those of the files.

    It compares with the published statistics, or else with band_stats.json in the set's folder; None without either.

    Raises UserError: band_stats.json has another structure.
    """
    stats, separation = dict(spec.published_stats), MIN_SEPARATION
    path = folder / "band_stats.json"
    if not stats and path.exists():
        content, separation = _read_json(path), MIN_SEPARATION_BAND_STATS
        if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
            raise UserError(f"{path} does not have GEO-Bench's structure: every entry must be an object.", path=path)
        pairs = {key: (entry.get("mean"), entry.get("std")) for key, entry in content.items()}
        stats = {key: pair for key, pair in pairs.items() if all(map(_is_finite, pair)) and pair[1] > 0}
    published = {key: (stats[key][0] * scale, stats[key][1] * scale) if key in stats else None for key in keys}
    return functools.partial(check_band_means, spec.name, published, separation) if any(published.values()) else None


def _is_finite(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def check_band_means(
    set_name: str, published: Mapping[str, tuple[float, float] | None], min_separation: float, means: np.ndarray
) -> None:
    """Raise UserError if a mean, (band,), deviates from the published one, or if two bands seem swapped.

    Args:
        published: mean and standard deviation by key; None where nothing is published.
        min_separation: a swap of two bands is detected if their published means differ by more than this, in
            standard deviations.
    """
    stats_and_mean = {
        key: (*stats, float(mean)) for (key, stats), mean in zip(published.items(), means, strict=True) if stats
    }
    for key, (expected, std, mean) in stats_and_mean.items():
        if abs(mean - expected) > MEAN_TOLERANCE * std:
            raise UserError(
                f"{set_name}: the mean of '{key}' is {mean:.6g}, but the published mean is {expected:.6g} (std "
                f"{std:.6g}). These are not the released files, or their bands are in another order. {_HINT}",
                key=key, value=mean,
            )  # fmt: skip
    for (key_a, a), (key_b, b) in itertools.combinations(stats_and_mean.items(), 2):
        (expected_a, std_a, mean_a), (expected_b, std_b, mean_b) = a, b
        separated = abs(expected_a - expected_b) > min_separation * math.sqrt(std_a * std_b)
        deviation = abs(mean_a - expected_a) + abs(mean_b - expected_b)
        swapped_deviation = abs(mean_a - expected_b) + abs(mean_b - expected_a)
        if separated and 2 * swapped_deviation < deviation:
            raise UserError(
                f"{set_name}: the means of '{key_a}' and '{key_b}' are {mean_a:.6g} and {mean_b:.6g}, but the "
                f"published means are {expected_a:.6g} and {expected_b:.6g}. The two seem to be swapped. {_HINT}",
                key=key_a, value=mean_a,
            )  # fmt: skip
