"""Students: compact timm networks from raw chips to logits; initial weights and saved files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import timm
import torch
import xarray as xr
from torch import nn
from torch.nn import functional
from torchvision.ops import FeaturePyramidNetwork

from cache.atomic import write_file
from pipeline.backbones import get_spec
from pipeline.backbones.checkpoints import load_strict, read_checkpoint
from pipeline.config import BackboneConfig, StudentConfig
from pipeline.data.image_store import image_bands
from pipeline.errors import UserError
from pipeline.tasks import get_task

Tensors = Mapping[str, torch.Tensor]

# Channels of the decoder for segmentation.
DECODER_CHANNELS = 32
# Number of levels of a student: the deepest ones of its network.
N_LEVELS = 4
TENSORS_FILE, METADATA_FILE = "student.pt", "student.json"


@dataclass(frozen=True)
class StudentSpec:
    """Everything that determines the shapes of a student's tensors; `input_size` is a side in pixels."""

    architecture: str
    n_bands: int
    n_classes: int
    task: str
    input_size: int


class Student(nn.Module):
    """Network from raw chips, float32 (batch, band, y, x) as in the images store, to float32 logits.

    So that an exported graph takes raw chips, the network normalizes them by each band's `mean` and `std` over the
    training split, and resizes them to its input size. Classification: logits (batch, class) from the spatial means
    of all levels. Segmentation: logits (batch, class, y, x) of the chips' own size from a feature pyramid network
    (Lin et al., CVPR 2017, arXiv 1612.03144). UserError if the network has no such levels or too small an input.
    """

    def __init__(self, spec: StudentSpec, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.spec, self.is_dense = spec, get_task(spec.task).is_dense
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))
        self.network = _create_network(spec)
        self.channels = list(self.network.feature_info.channels())
        self.strides = list(self.network.feature_info.reduction())
        if self.is_dense:
            self.pyramid = FeaturePyramidNetwork(self.channels, DECODER_CHANNELS)
            self.head: nn.Module = nn.Conv2d(DECODER_CHANNELS, spec.n_classes, 1)
        else:
            self.head = nn.Linear(sum(self.channels), spec.n_classes)

    def forward(self, chips: torch.Tensor) -> torch.Tensor:
        return self.logits(self.levels(chips), chips.shape[-2:])

    def levels(self, chips: torch.Tensor) -> list[torch.Tensor]:
        """Compute the network's feature maps (batch, channel, y, x), finest first."""
        values, side = (chips - self.mean) / self.std, self.spec.input_size
        if chips.shape[-2:] != (side, side):
            shrinks = side < min(chips.shape[-2:])
            values = functional.interpolate(values, size=(side, side), mode="bilinear", antialias=shrinks)
        return self.network(values)

    def logits(self, levels: Sequence[torch.Tensor], size: Sequence[int]) -> torch.Tensor:
        """Apply the head to feature maps; segmentation logits are resized to `size` (y, x)."""
        if not self.is_dense:
            return self.head(torch.cat([level.mean(dim=(2, 3)) for level in levels], dim=1))
        finest = self.pyramid({str(index): level for index, level in enumerate(levels)})["0"]
        # With few channels, resizing a channels-last tensor is slow, and so is everything after it.
        return functional.interpolate(self.head(finest).contiguous(), size=tuple(size), mode="bilinear")


def _create_network(spec: StudentSpec) -> nn.Module:
    """Create timm's network without its classifier; weights are random."""
    name, size = spec.architecture, spec.input_size

    def refusal(reason: str, key: str = "students.network", value: object = name) -> UserError:
        problem = f"timm's '{name}' cannot be a student with an input of {size} px and {spec.n_bands} bands"
        return UserError(f"{problem}: {' '.join(reason.split())[:160]}", key=key, value=value)

    if not timm.is_model(name):
        raise refusal("timm has no such network. List its networks with `timm.list_models()`.")
    try:
        levels = tuple(range(-N_LEVELS, 0))
        network = timm.create_model(name, features_only=True, in_chans=spec.n_bands, out_indices=levels)
        stride, channels = max(network.feature_info.reduction()), network.feature_info.channels()
        if size < stride:
            reason = f"the stride of its deepest level is {stride}. Set a larger chip_size or mask_size."
            raise refusal(reason, "students.input_size", size)
        with torch.no_grad():
            maps = network.eval()(torch.zeros(1, spec.n_bands, size, size))
    except (RuntimeError, AssertionError, TypeError, AttributeError, IndexError) as error:
        raise refusal(str(error)) from None
    if [level.ndim for level in maps] != [4] * N_LEVELS or [level.shape[1] for level in maps] != channels:
        raise refusal("its outputs are not maps (channel, y, x). Choose another network.")
    return network.train()


def make_spec(images: xr.Dataset, student: StudentConfig) -> StudentSpec:
    """Return the spec of a student for an images store."""
    task = images.attrs["task"]
    input_size = student.mask_size if get_task(task).is_dense else student.chip_size
    return StudentSpec(student.network, images.sizes["band"], len(images.attrs["classes"]), task, input_size)


def make_student(
    spec: StudentSpec, mean: Sequence[float], std: Sequence[float], network_state: Tensors | None, seed: int
) -> Student:
    """Create a student before training, with tensors from `pretrained_state` or random ones from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = Student(spec, mean, std)
    if network_state is not None:
        load_strict(student.network, network_state, Path(spec.architecture))
    return student


def pretrained_state(
    name: str, backbone: BackboneConfig, weights_dir: Path, spec: StudentSpec, bands: Sequence[str]
) -> Tensors:
    """Read a backbone's weights as the initial tensors of a student's network, by name.

    The input layer is adapted to the images' bands (common names): a band that the backbone was trained on keeps its
    filters, another band gets the mean of all filters. The filters are then scaled by the ratio of the numbers of
    bands, so that the layer's outputs keep their magnitude. UserError if the file is absent or damaged, or has the
    tensors of another network.
    """
    backbone_spec = get_spec(backbone)
    path = weights_dir / (backbone_spec.weights_file or "")
    if not path.is_file() or path.suffix == ".onnx":
        raise UserError(
            f"A student cannot start from backbone '{name}': there is no weights file of a timm network at {path}. "
            "Set the student's weights to random.",
            key="students.weights", value=name, path=path,
        )  # fmt: skip
    known_bands = backbone_spec.bands
    network = _create_network(replace(spec, n_bands=len(known_bands)))
    expected, stored = network.state_dict(), read_checkpoint(path)
    if backbone.family == "efficientnet" and hasattr(network, "blocks"):
        # segmentation_models_pytorch takes seconds to import; a student without such weights needs none of it
        from pipeline.backbones.efficientnet import timm_name

        stages = [len(stage) for stage in network.blocks]
        stored = {timm_name(key, stages): tensor for key, tensor in stored.items()}
    tensors = {
        key: stored[key] for key, tensor in expected.items() if key in stored and stored[key].shape == tensor.shape
    }
    if missing := [key for key in expected if key not in tensors and not key.endswith("num_batches_tracked")]:
        raise UserError(
            f"Backbone '{name}' is not the network {spec.architecture}: {missing[0]} is absent from its weights or "
            "has another shape. Set the student's weights to random, or its network to the backbone's.",
            key="students.weights", value=name, path=path,
        )  # fmt: skip
    # Filters (out, band, y, x) of the input layer.
    first = next(key for key, tensor in expected.items() if tensor.ndim == 4)
    filters, mean_filter = tensors[first], tensors[first].mean(dim=1)
    adapted = [filters[:, known_bands.index(band)] if band in known_bands else mean_filter for band in bands]
    return {**expected, **tensors, first: torch.stack(adapted, dim=1) * (len(known_bands) / len(bands))}


def student_metadata(images: xr.Dataset, dataset: str, variant: str, weights: str, teacher: str | None) -> dict:
    """Return the metadata of a student trained on an images store, for `save_student`."""
    task = images.attrs["task"]
    bands = [
        {"name": band.name, "common_name": band.common_name,
         "wavelength": float(band.wavelength) if band.is_optical else None}
        for band in image_bands(images)
    ]  # fmt: skip
    return {
        "dataset": dataset, "task": task, "classes": list(images.attrs["classes"]),
        "ignore": get_task(task).ignore_value, "bands": bands, "units": images.attrs["units"],
        "gsd": float(images.attrs["gsd"]), "size": [images.sizes["y"], images.sizes["x"]],
        "variant": variant, "weights": weights, "teacher": teacher,
    }  # fmt: skip


def save_student(folder: Path, student: Student, metadata: Mapping) -> None:
    """Write a student's tensors and then its metadata to a folder."""
    buffer = BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in student.state_dict().items()}, buffer)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / TENSORS_FILE, [buffer.getbuffer()])
    written = {
        **metadata,
        "architecture": student.spec.architecture,
        "input_size": student.spec.input_size,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "mean": student.mean.flatten().tolist(),
        "std": student.std.flatten().tolist(),
    }
    write_file(folder / METADATA_FILE, [(json.dumps(written, indent=1, sort_keys=True) + "\n").encode()])


def load_student(folder: Path) -> tuple[Student, dict]:
    """Load a saved student, in evaluation mode, and its metadata; refuse absent, damaged or foreign files."""
    metadata_path, tensors_path = folder / METADATA_FILE, folder / TENSORS_FILE
    for path in (metadata_path, tensors_path):
        if not path.exists():
            raise UserError(f"There is no student in {folder}: {path} is absent. Run: dvc repro distill", path=path)
    try:
        metadata = json.loads(metadata_path.read_text())
        n_bands, n_classes = len(metadata["bands"]), len(metadata["classes"])
        spec = StudentSpec(metadata["architecture"], n_bands, n_classes, metadata["task"], metadata["input_size"])
        mean, std = metadata["mean"], metadata["std"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{metadata_path} does not describe a student ({error!r}). Run: dvc repro distill", path=metadata_path
        ) from None
    with torch.random.fork_rng(devices=[]):
        student = Student(spec, mean, std)
    load_strict(student, read_checkpoint(tensors_path), tensors_path)
    return student.eval(), metadata
