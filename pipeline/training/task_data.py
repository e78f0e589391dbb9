"""Data of a task: a dataset's labels and a model's features, aligned, standardized and split.

Linear heads are trained in the principal axes of pooled features, because AdamW scales every weight separately, which
converges slowly if channels are correlated, as a backbone's are. Each array is rotated separately, so that the cost
grows with its width only. A rotation changes neither the functions that a linear head can represent nor its sum of
squared weights. A trained head is rotated back; only axes of almost no variance are lost (`MIN_VARIANCE`).

Adam in an eigenbasis is from SOAP (Vyas et al. 2024, arXiv 2409.11321), which uses the basis of the gradients.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from threadpoolctl import threadpool_limits

from cache.errors import StoreError
from cache.reader import FeatureStore, check_aligned
from pipeline.config import HeadsConfig
from pipeline.data import image_store
from pipeline.errors import UserError
from pipeline.feature_ops import channels_last
from pipeline.heads import get_head
from pipeline.heads.config import HeadConfig, head_options
from pipeline.heads.linear import StackedLinear
from pipeline.tasks import IGNORE, Task, get_task
from pipeline.training import feature_loader
from pipeline.training.feature_loader import ChannelStats, SplitData, StoreArray, StreamedFeatures, read_standardized
from pipeline.training.loop import TrainSchedule

# Masks that are read at once to find a labelled pixel.
MASKS_PER_READ = 64
# Axes of less variance (a standardized channel has 1) are set to zero: AdamW would amplify the rounding to float16
# that they consist of to the scale of the others.
MIN_VARIANCE = 1e-5


@dataclass(frozen=True)
class TaskData:
    """Features and labels of a dataset for a model, and the configuration of its heads.

    Attributes:
        array_names: names of each backbone's arrays that the heads read.
        mean_scale: for each of these arrays, `feature_loader.to_mean_scale`.
        rotations: principal axes of each array, in which linear heads are trained; empty for none.
    """

    splits: dict[str, SplitData]
    task: Task
    class_names: list[str]
    array_names: list[list[str]]
    mean_scale: list[tuple[np.ndarray, np.ndarray]]
    rotations: list[torch.Tensor]
    head_config: HeadConfig
    schedule: TrainSchedule


def load(
    stores: Mapping[Path, str | None], images_path: Path, heads: HeadsConfig, splits: Sequence[str], device: str
) -> TaskData:
    """Load the splits of a dataset and of a model's features.

    If the splits need more memory than `heads.max_feature_gb`, their features are streamed from the disk.

    Args:
        stores, images_path: as for `open_aligned`.
        splits: names of the splits to load; `val` is added if early stopping needs it.

    Raises:
        StoreError: as `open_aligned`, or there is no such level, or features are non-finite.
        UserError: a parameter does not fit the task, or a split of masks has no labelled pixel.
    """
    members, images = open_aligned(stores, images_path)
    task = task_from_store(images)
    head_name = heads.segmentation if task.is_dense else "linear"
    if task.is_dense:
        get_head(head_name)
    settings = heads.settings(head_name)
    schedule = TrainSchedule(settings.steps, settings.batch, settings.patience, heads.val_checks)
    split_names = dict.fromkeys([*splits, *(["val"] if schedule.patience else [])])
    rows = {split: np.flatnonzero(members[0].split == split) for split in [*split_names, "train"]}
    if task.is_dense:
        _check_labelled(images, rows)

    arrays_of_member = feature_loader.select_arrays(members, heads, task.is_dense)
    arrays = list(chain(*arrays_of_member))
    stats = [feature_loader.channel_stats(array, rows["train"]) for array in arrays]
    rotations = []
    # Fusions that combine backbones channel by channel need the original channels.
    if not task.is_dense and (heads.fusion == "concat" or len(members) == 1):
        rotations = [rotation.to(device) for rotation in principal_axes(arrays, stats, rows["train"])]
    # Linear heads are trained on a rotated copy of the training split.
    n_rows = sum(len(rows[split]) for split in split_names) + (len(rows["train"]) if rotations else 0)
    shapes = tuple(tuple(tuple(store.array(name).shape) for store, name in member) for member in arrays_of_member)
    feature_bytes = 4 * n_rows * sum(prod(shape) for shape in chain(*shapes))
    read = StreamedFeatures if feature_bytes > heads.max_feature_gb * 1e9 else _read_inputs
    split_data = {}
    for split in split_names:
        inputs = read(arrays, stats, rows[split], device, is_pooled=not task.is_dense)
        label = torch.from_numpy(images.label[rows[split]].values.astype(np.uint8 if task.is_dense else np.int64))
        split_data[split] = SplitData(inputs, label.to(device), members[0].sample[rows[split]].tolist())

    if heads.class_weights == "balanced":
        task = replace(task, class_weights=balanced_weights(images.label[rows["train"]].values, task))
    return TaskData(
        split_data,
        task,
        class_names=list(images.attrs["classes"]),
        array_names=[[name for _, name in member] for member in arrays_of_member],
        mean_scale=[feature_loader.to_mean_scale(*array_stats) for array_stats in stats],
        rotations=rotations,
        head_config=head_config(heads, head_name, shapes, task, tuple(images.label.shape[1:]), device),
        schedule=schedule,
    )


def open_aligned(stores: Mapping[Path, str | None], images_path: Path) -> tuple[list[FeatureStore], xr.Dataset]:
    """Open feature stores and their images store, and check that they belong together.

    Args:
        stores: feature stores, and the content digests that they must have; None for no check.
        images_path: the images store that the features were extracted from.

    Raises:
        StoreError: stores differ in their samples, were extracted from other images, or are not those resolved.
    """
    for path in stores:
        if not Path(path).exists():
            stage = f"extract@{path.parent.name}-{path.stem}"
            raise StoreError(f"There is no feature store at {path}. Run: dvc repro {stage}", path=path)
    members = [FeatureStore(path) for path in stores]
    check_aligned(members)
    images = image_store.open_images(images_path)
    for (path, resolved), member in zip(stores.items(), members, strict=True):
        checks = {
            "content_sha256": (resolved, "is not the store that was resolved for this model"),
            "images_sha256": (images.attrs["content_sha256"], f"was extracted from other images than {images_path}"),
        }
        for key, (expected, mistake) in checks.items():
            digest = member.attributes[key]
            if expected and digest != expected:
                message = f"{path} {mistake}. Run: dvc repro"
                raise StoreError(message, key=key, value=digest, allowed=[expected], path=path)
        if member.sample.tolist() != images.sample.values.tolist():
            message = f"{path} has its samples in another order than {images_path}. Run: dvc repro"
            raise StoreError(message, key="sample", path=path)
    return members, images


def task_from_store(images: xr.Dataset) -> Task:
    return get_task(images.attrs["task"])(len(images.attrs["classes"]))


def balanced_weights(label: np.ndarray, task: Task) -> tuple[float, ...]:
    """Return a weight per class, inverse to its frequency in the training labels; 1 for absent classes."""
    if task.is_multilabel:
        message = "heads.class_weights is 'balanced', but this dataset is multi-label. Set it to 'none'."
        raise UserError(message, key="heads.class_weights", value="balanced", allowed=["none"])
    count = task.class_frequencies(label)
    is_present = count > 0
    weights = np.where(is_present, count.sum() / (is_present.sum() * np.maximum(count, 1)), 1.0)
    return tuple(weights.tolist())


def _check_labelled(images: xr.Dataset, rows: Mapping[str, np.ndarray]) -> None:
    """Refuse a split of masks without a labelled pixel: its score would be 0 for any prediction."""
    for split, index in rows.items():
        # Lazy: the first masks nearly always have a label.
        batches = np.array_split(index, range(MASKS_PER_READ, len(index), MASKS_PER_READ))
        if not any((images.label[batch].values != IGNORE).any() for batch in batches):
            raise UserError(
                f"No mask of the split {split} has a labelled pixel: all values are {IGNORE}, which is ignored. "
                "Change the dataset's splits, seed or block in params.yaml, or add labels.",
                key="split",
                value=split,
            )


def _read_inputs(
    arrays: Iterable[StoreArray], stats: Iterable[ChannelStats], rows: np.ndarray, device: str, is_pooled: bool
) -> torch.Tensor | list[torch.Tensor]:
    pairs = zip(arrays, stats, strict=True)
    values = (read_standardized(array, rows, array_stats).to(device) for array, array_stats in pairs)
    return torch.cat(list(values), dim=1) if is_pooled else [channels_last(level) for level in values]


def head_config(
    heads: HeadsConfig, head_name: str, shapes: tuple, task: Task, mask_size: tuple[int, ...], device: str
) -> HeadConfig:
    """Configure a head from params.yaml; on a GPU, `precision: auto` is bfloat16."""
    if not task.is_dense:
        return HeadConfig(head_name, heads.fusion, shapes, task.n_classes)
    automatic = "bfloat16" if device.startswith("cuda") else "float32"
    precision, settings = automatic if heads.precision == "auto" else heads.precision, heads.settings(head_name)
    options, neck = head_options(settings), getattr(settings, "neck", False)
    return HeadConfig(head_name, heads.fusion, shapes, task.n_classes, mask_size, options, neck, precision)


def principal_axes(
    arrays: Sequence[StoreArray], stats: Sequence[ChannelStats], train_rows: np.ndarray
) -> list[torch.Tensor]:
    """Compute the principal axes of each array's standardized channels over the training rows.

    A matrix per array, float32 (channel, axis); an axis of less variance than `MIN_VARIANCE` is a column of zeros.
    """
    rows_per_read = feature_loader.STAT_ROWS_PER_READ
    parts = np.array_split(train_rows, range(rows_per_read, len(train_rows), rows_per_read))
    rotations = []
    with threadpool_limits(1):  # floating-point rounding depends on the number of threads of BLAS
        for array, array_stats in zip(arrays, stats, strict=True):
            values = (read_standardized(array, rows, array_stats).numpy().astype(np.float64) for rows in parts)
            variance, axes = np.linalg.eigh(sum(part.T @ part for part in values) / len(train_rows))
            rotations.append(torch.from_numpy(axes * (variance > MIN_VARIANCE)).float())
    return rotations


def rotate(
    inputs: torch.Tensor | StreamedFeatures, rotations: Sequence[torch.Tensor]
) -> torch.Tensor | StreamedFeatures:
    """Rotate concatenated arrays (sample, channel), each by its matrix (channel, axis)."""
    if isinstance(inputs, StreamedFeatures):
        return inputs.rotate(rotations)
    parts = inputs.split([len(rotation) for rotation in rotations], dim=1)
    return torch.cat([part @ rotation for part, rotation in zip(parts, rotations, strict=True)], dim=1)


@torch.no_grad()
def rotate_back(group: StackedLinear, rotations: Sequence[torch.Tensor]) -> None:
    """Change heads trained on rotated inputs so that they give the same logits on the inputs themselves."""
    (weights,) = group.weights  # (head, class, channel)
    for weight in weights:  # one by one: a head's rounding must not depend on the number of heads
        parts = weight.split([len(rotation) for rotation in rotations], dim=1)
        weight.copy_(torch.cat([part @ rotation.T for part, rotation in zip(parts, rotations, strict=True)], dim=1))
