"""One cell of the grid, a dataset seen through a model: its features, labels and heads, ready to train."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from cache.read import Features, aligned
from cache.schema import StoreError
from pipeline import fit, fusion, images
from pipeline.heads.linear import LinearGroup
from pipeline.heads.upernet import UperNetGroup
from pipeline.params import Heads


@dataclass(frozen=True)
class Part:
    """Features and labels of one split."""

    sample: list[str]
    inputs: torch.Tensor | list[torch.Tensor]
    label: torch.Tensor


@dataclass(frozen=True)
class Cell:
    """The splits asked for, and how to train on them.

    Attributes:
        parts: by split.
        task: what is asked.
        train: from settings to a trained group of heads.
        batch: samples per step.
    """

    parts: dict[str, Part]
    task: fit.Task
    train: Callable[[Sequence[fit.Setting]], torch.nn.Module]
    batch: int

    def counts(self, group: torch.nn.Module, split: str) -> np.ndarray:
        """Per-sample counts of every head on a split, (head, sample, cells)."""
        part = self.parts[split]
        return fit.evaluate(group, part.inputs, part.label, self.task, self.batch)

    def logits(self, group: torch.nn.Module, split: str) -> np.ndarray:
        """What every head says of a split's chips, float32 (head, sample, class); for pooled vectors."""
        return fit.logits(group, self.parts[split].inputs, self.batch)


def opened(stores: Mapping[Path, str | None], pictures: Path) -> tuple[list[Features], xr.Dataset]:
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
    members = [Features(path) for path in stores]
    aligned(members)
    labelled = images.open_images(pictures)
    for member in members:
        if (wanted := stores[member.location]) and member.attributes["content_sha256"] != wanted:
            raise StoreError(f"{member.location} is not the store that was resolved for this model. Run: dvc repro")
        if member.attributes["images_sha256"] != labelled.attrs["content_sha256"]:
            raise StoreError(f"{member.location} was made from other images than {pictures}. Run: dvc repro")
        if member.sample.tolist() != labelled.sample.values.tolist():
            raise StoreError(f"{member.location} lists its samples in another order than {pictures}. Run: dvc repro")
    return members, labelled


def task_of(labelled: xr.Dataset) -> fit.Task:
    """What an images store asks."""
    kind = labelled.attrs["task"]
    return fit.Task(kind, len(labelled.attrs["classes"]), images.IGNORE if kind == "segmentation" else None)


def load(stores: Mapping[Path, str | None], pictures: Path, heads: Heads, splits: Sequence[str], device: str) -> Cell:
    """Open the members' stores, check that they belong together, and bring the splits into memory.

    Args:
        stores, pictures: as for `opened`.
        splits: the splits to read; nothing is read of the others.

    Raises:
        StoreError: as `opened` does.
    """
    members, labelled = opened(stores, pictures)
    task = task_of(labelled)
    kind = task.kind
    rows = {split: np.flatnonzero(members[0].split == split) for split in {*splits, "train"}}
    parts = {}
    for split in splits:
        if kind == "segmentation":
            inputs = [
                level.to(device, memory_format=torch.channels_last) for level in fusion.pyramid(members, rows[split])
            ]
        else:
            inputs = fusion.pooled(members, heads.linear.pooled, heads.linear.tokens, rows[split], rows["train"]).to(
                device
            )
        label = torch.from_numpy(labelled.label[rows[split]].values.astype(np.int64)).to(device)
        parts[split] = Part(members[0].sample[rows[split]].tolist(), inputs, label)

    example = parts[splits[0]]
    if kind == "segmentation":
        chosen, widths = heads.upernet, [level.shape[1] for level in example.inputs]
        group = partial(UperNetGroup, widths, chosen.channels, task.classes, tuple(example.label.shape[1:]))
    else:
        chosen, group = heads.linear, partial(LinearGroup, example.inputs.shape[1], task.classes)

    def train(settings: Sequence[fit.Setting]) -> torch.nn.Module:
        part = parts["train"]
        return fit.fit(
            lambda seeds: group(seeds=seeds),
            part.inputs,
            part.label,
            task,
            settings,
            chosen.steps,
            chosen.batch,
        )

    return Cell(parts, task, train, chosen.batch)
