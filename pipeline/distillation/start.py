"""What a student starts from: random tensors, or those that a backbone of the same network was trained to."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.backbones.base import BackboneSpec
from pipeline.backbones.checkpoints import load_strict, read_checkpoint
from pipeline.config import BackboneConfig
from pipeline.distillation.student_files import Student, StudentSpec
from pipeline.errors import UserError

Tensors = Mapping[str, torch.Tensor]


def make_student(
    shape: StudentSpec, mean: Sequence[float], std: Sequence[float], start: Tensors | None, seed: int
) -> Student:
    """A student before training, drawn from a seed; its network's tensors are replaced by those of `start`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = Student(shape, mean, std)
    if start is not None:
        load_strict(student.network, start, Path(shape.architecture))
    return student


def pretrained_state(
    name: str,
    backbone: BackboneConfig,
    declared: BackboneSpec,
    folder: Path,
    shape: StudentSpec,
    bands: Sequence[str],
) -> Tensors:
    """The tensors of a backbone's file for a student of the same network; nothing is run.

    The first layer is made for the images' bands: one that the backbone knows keeps its filters, any other has the
    mean of all; together they are scaled so that the layer's sums stay as large as they were.

    Args:
        name, backbone, declared: of params.yaml's table, and its declaration.
        folder: of the weights, as fetched.
        bands: common names of the images' bands, in order.

    Raises:
        UserError: the file is not there or damaged, or holds another network's tensors.
    """
    path = Path(folder) / (declared.weights_file or "")
    if not path.is_file() or path.suffix == ".onnx":
        raise UserError(
            f"Backbone '{name}' has no file of a timm network at {path}, so no student can start from it."
        )
    held = _timm_names(backbone, read_checkpoint(path))
    blank = Student(replace(shape, bands=len(declared.bands)), *[[0.0] * len(declared.bands)] * 2).network
    wanted = blank.state_dict()
    tensors = {key: held[key] for key in wanted if key in held}
    fits = [key for key in tensors if tensors[key].shape == wanted[key].shape]
    lacking = [key for key in wanted if key not in fits and not key.endswith("num_batches_tracked")]
    if lacking:
        raise UserError(
            f"Backbone '{name}' is not the network {shape.architecture}: its file does not fit {lacking[0]}. Set the "
            "student's weights to random, or its network to the backbone's."
        )
    first = next(key for key, tensor in wanted.items() if tensor.ndim == 4)
    return {**wanted, **tensors, first: _adapt_input_filters(tensors[first], declared.bands, bands)}


def _timm_names(backbone: BackboneConfig, tensors: Tensors) -> Tensors:
    if backbone.family != "efficientnet":
        return tensors
    from pipeline.backbones.efficientnet import timm_name

    return {timm_name(name): tensor for name, tensor in tensors.items()}


def _adapt_input_filters(filters: torch.Tensor, known: Sequence[str], bands: Sequence[str]) -> torch.Tensor:
    """Filters (out, band, y, x) of the backbone's bands as filters of the images'."""
    other = filters.mean(dim=1)
    chosen = [filters[:, known.index(band)] if band in known else other for band in bands]
    return torch.stack(chosen, dim=1) * (filters.shape[1] / len(bands))
