"""One cell of the grid, a dataset seen through a model: its features, labels and heads, ready to train."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from cache.errors import StoreError
from cache.reader import FeatureStore, check_aligned
from pipeline.config import HeadsConfig
from pipeline.data import image_store
from pipeline.errors import UserError
from pipeline.heads.config import HeadConfig
from pipeline.training import feature_inputs, loop, pca
from pipeline.training.feature_loader import StreamedFeatures, channels_last

# Masks looked at together for a labelled pixel.
_MASKS = 64


@dataclass(frozen=True)
class SplitData(loop.Data):
    """Features and labels of one split, and its samples' names."""

    sample: list[str]


@dataclass(frozen=True)
class TaskData:
    """The splits asked for, and how to train on them.

    Attributes:
        parts: by split.
        task: what is asked.
        train: from settings to a trained group of heads.
        batch: samples per step.
        names: of the classes.
        fields: of each member, the names of the arrays that are read.
        by: of each of these, `fusion.factors`.
        blueprint: of the heads.
    """

    parts: dict[str, SplitData]
    task: loop.Task
    train: Callable[[Sequence[loop.HParams]], torch.nn.Module]
    batch: int
    names: list[str]
    fields: list[list[str]]
    by: list[tuple[np.ndarray, np.ndarray]]
    blueprint: HeadConfig

    def counts(self, group: torch.nn.Module, split: str) -> np.ndarray:
        """Per-sample counts of every head on a split, (head, sample, cells)."""
        return loop.evaluate(group, self.parts[split], self.task, self.batch)

    def logits(self, group: torch.nn.Module, split: str) -> np.ndarray:
        """What every head says of a split's chips, float32 (head, sample, class); for pooled vectors."""
        return loop.predict_logits(group, self.parts[split].inputs)


def load(
    stores: Mapping[Path, str | None], pictures: Path, heads: HeadsConfig, splits: Sequence[str], device: str
) -> TaskData:
    """Open the members' stores, check that they belong together, and bring the splits into memory.

    Splits that are larger than `heads.max_feature_gb` together stay on disk and are streamed.

    Args:
        stores: the members' stores, and the content digests they must have; None leaves that unchecked.
        splits: the splits to read; nothing is read of the others, but validation where it decides when to stop.

    Raises:
        StoreError: stores that differ in samples, were made from other images, or are not those resolved.
        UserError: parameters that do not fit the task, or a split of masks without a labelled pixel.
    """
    members, labelled = open_aligned(stores, pictures)
    task = task_from_store(labelled)
    kind, classes = task.type, task.n_classes
    dense = kind == "segmentation"
    chosen = getattr(heads, heads.segmentation if dense else "linear")
    recipe = loop.TrainSchedule(chosen.steps, chosen.batch, chosen.patience, heads.val_checks)
    wanted = dict.fromkeys([*splits, *(["val"] if chosen.patience else [])])
    rows = {split: np.flatnonzero(members[0].split == split) for split in [*wanted, "train"]}
    if dense:
        _refuse_unlabelled(labelled, rows)

    grouped = (
        feature_inputs.select_levels(members, heads.levels)
        if dense
        else feature_inputs.select_pooled(members, heads.linear.pooled, heads.linear.tokens, heads.levels)
    )
    fields = list(chain(*grouped))
    by = [feature_inputs.channel_stats(field, rows["train"]) for field in fields]
    # What mixes members channel by channel needs their channels.
    straight = dense or (heads.fusion != "concat" and len(members) > 1)
    turns = [] if straight else [one.to(device) for one in pca.principal(fields, by, rows["train"])]
    # Linear heads are trained on a turned copy.
    count = sum(len(rows[split]) for split in wanted) + (len(rows["train"]) if turns else 0)
    held = 4 * count * sum(prod(_shape(field)) for field in fields)
    parts = {}
    for split in wanted:
        if held > heads.max_feature_gb * 1e9:
            inputs = StreamedFeatures(fields, by, rows[split], device, vectors=not dense)
        else:
            inputs = _in_memory(fields, by, rows[split], device, dense)
        label = torch.from_numpy(labelled.label[rows[split]].values.astype(np.uint8 if dense else np.int64))
        parts[split] = SplitData(inputs, label.to(device), members[0].sample[rows[split]].tolist())

    if heads.class_weights == "balanced":
        task = replace(task, weights=_balanced(labelled.label[rows["train"]].values, kind, classes))
    shapes = tuple(tuple(_shape(field) for field in member) for member in grouped)
    blueprint = _blueprint(heads, shapes, classes, tuple(labelled.label.shape[1:]), device if dense else None)
    train = make_trainer(parts, task, recipe, blueprint, turns)
    names = [[name for _, name in member] for member in grouped]
    factors = [feature_inputs.to_mean_scale(*each) for each in by]
    return TaskData(parts, task, train, chosen.batch, list(labelled.attrs["classes"]), names, factors, blueprint)


def make_trainer(
    parts: Mapping[str, SplitData],
    task: loop.Task,
    recipe: loop.TrainSchedule,
    blueprint: HeadConfig,
    turns: Sequence[torch.Tensor],
) -> Callable[[Sequence[loop.HParams]], torch.nn.Module]:
    """`Cell.train`: heads trained in the axes `turns` of their arrays, if there are any, and turned back."""

    def turned(part: SplitData) -> SplitData:
        return replace(part, inputs=pca.turned(part.inputs, turns)) if turns else part

    def train(settings: Sequence[loop.HParams]) -> torch.nn.Module:
        validation = turned(parts["val"]) if recipe.patience else None
        group = loop.fit(blueprint.create_group, turned(parts["train"]), task, settings, recipe, validation)
        if turns:
            pca.turn_back(group, turns)
        return group

    return train


def open_aligned(stores: Mapping[Path, str | None], pictures: Path) -> tuple[list[FeatureStore], xr.Dataset]:
    """The members' stores and the images store they were made from, checked to belong together.

    Args:
        stores: the members' stores, and the content digests they must have; None leaves that unchecked.

    Raises:
        StoreError: stores that differ in samples, were made from other images, or are not those resolved.
    """
    for path in stores:
        if not Path(path).exists():
            raise StoreError(
                f"There is no feature store at {path}. Run: dvc repro extract@{path.parent.name}-{path.stem}"
            )
    members = [FeatureStore(path) for path in stores]
    check_aligned(members)
    labelled = image_store.open_images(pictures)
    for member in members:
        if (wanted := stores[member.location]) and member.attributes["content_sha256"] != wanted:
            raise StoreError(f"{member.location} is not the store that was resolved for this model. Run: dvc repro")
        if member.attributes["images_sha256"] != labelled.attrs["content_sha256"]:
            raise StoreError(f"{member.location} was made from other images than {pictures}. Run: dvc repro")
        if member.sample.tolist() != labelled.sample.values.tolist():
            raise StoreError(f"{member.location} lists its samples in another order than {pictures}. Run: dvc repro")
    return members, labelled


def task_from_store(labelled: xr.Dataset) -> loop.Task:
    """What an images store asks."""
    kind = labelled.attrs["task"]
    return loop.Task(kind, len(labelled.attrs["classes"]), image_store.IGNORE if kind == "segmentation" else None)


def _refuse_unlabelled(labelled: xr.Dataset, rows: Mapping[str, np.ndarray]) -> None:
    """Masks that ask nothing would be scored, and as badly as can be."""
    for split, index in rows.items():
        # The first masks are almost always enough.
        some = (labelled.label[index[start : start + _MASKS]].values for start in range(0, len(index), _MASKS))
        if not any((masks != image_store.IGNORE).any() for masks in some):
            raise UserError(
                f"The split {split} has {len(index)} masks and no labelled pixel: all are {image_store.IGNORE}, which is "
                "not counted. Deal the splits otherwise (splits, seed and block of the data set in params.yaml), or "
                "add labels."
            )


def _in_memory(fields: Sequence[feature_inputs.Field], by, rows: np.ndarray, device: str, dense: bool):
    read = (feature_inputs.standardised(field, rows, each).to(device) for field, each in zip(fields, by, strict=True))
    return [channels_last(level) for level in read] if dense else torch.cat(list(read), dim=1)


def _shape(field: feature_inputs.Field) -> tuple[int, ...]:
    store, name = field
    return tuple(store.array(name).shape)


def _blueprint(heads: HeadsConfig, shapes, classes: int, size: tuple[int, ...], device: str | None) -> HeadConfig:
    """What `heads` asks for; `device` is that of dense heads, none of linear ones."""
    if device is None:
        return HeadConfig("linear", heads.fusion, shapes, classes)
    automatic = "bfloat16" if device.startswith("cuda") else "float32"
    precision = automatic if heads.precision == "auto" else heads.precision
    if heads.segmentation == "fcn":
        return HeadConfig("fcn", heads.fusion, shapes, classes, size, precision=precision)
    channels, neck = heads.upernet.channels, heads.upernet.neck
    return HeadConfig("upernet", heads.fusion, shapes, classes, size, channels, neck, precision)


def _balanced(label: np.ndarray, kind: str, classes: int) -> tuple[float, ...]:
    """A weight a class, inverse to how often it occurs in training; one for those that do not."""
    if kind == "multilabel":
        raise UserError(
            "heads.class_weights is 'balanced', which is for one class a sample or a pixel; this set is multi-label. "
            "Set it to 'none'."
        )
    count = np.bincount(label[label != image_store.IGNORE] if kind == "segmentation" else label, minlength=classes)
    present = count > 0
    return tuple(np.where(present, count.sum() / (present.sum() * np.maximum(count, 1)), 1.0).tolist())
