"""Whether a kept head belongs to a data set's images and to what the backbones give."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import xarray as xr

from pipeline.errors import UserError
from pipeline.heads.checkpoint import TrainedHead


def check_head_matches_data(head: TrainedHead, path: Path, names: Sequence[str], opened: xr.Dataset) -> None:
    """Refuse a head of another model, task, classes or size of masks.

    Raises:
        UserError: what it is for, and what is asked.
    """
    classes, size = tuple(opened.attrs["classes"]), tuple(opened.label.shape[1:])
    pairs = {
        "of the model": (head.model, "+".join(names)),
        "for the task": (head.task, opened.attrs["task"]),
        "for the classes": (", ".join(head.class_names), ", ".join(classes)),
    }
    if head.task == "segmentation":
        pairs["for masks of"] = (head.config.output_size, size)
    for what, (its, wanted) in pairs.items():
        if its != wanted:
            raise UserError(
                f"The head in {path} is {what} {its}, and {wanted} is asked for: it was trained on another data set "
                "or model. Run: dvc repro train"
            )


def check_head_matches_features(head: TrainedHead, features: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Refuse features, as `Kept.logits` takes them, of which the head reads others.

    Raises:
        UserError: the array, the shape it had in training, and what the backbone gives.
    """
    for name, arrays, shapes, member in zip(
        head.backbones, head.array_names, head.config.shapes, features, strict=True
    ):
        for array, shape in zip(arrays, shapes, strict=True):
            given = tuple(member[array].shape[1:]) if array in member else "nothing"
            if given != tuple(shape):
                raise UserError(
                    f"The head of {head.model} reads {array} of shape {tuple(shape)} from {name}, which gives "
                    f"{given}: it was trained on features of other shapes. Run: dvc repro train"
                )
