"""Models with trainable backbones: the preprocessing of extraction, the backbones, and a trained head."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import xarray as xr
from torch import nn

from pipeline.backbones import create_backbone, get_spec, preprocessing
from pipeline.backbones.base import FeaturePyramid
from pipeline.backbones.encoder import Encoder
from pipeline.config import BackboneConfig, FineTuneConfig
from pipeline.errors import UserError
from pipeline.finetuning import layers
from pipeline.heads import checkpoint
from pipeline.heads.checkpoint import TrainedHead
from pipeline.tasks import get_task


@dataclass(frozen=True)
class EnsembleMember:
    """One backbone of a model; `name` is its key in params.yaml."""

    name: str
    backbone: BackboneConfig
    weights_dir: Path


class TrainableBackbone(nn.Module):
    """Wrapper that allows gradients inside `Encoder`, which runs in inference mode."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.gradients_enabled = network, False

    def forward(self, image: torch.Tensor, **metadata: torch.Tensor) -> FeaturePyramid:
        with torch.inference_mode(False), torch.set_grad_enabled(self.gradients_enabled):
            return self.network(image, **metadata)


class FineTunedEnsemble(nn.Module):
    """Backbones, in the order of their head, and the head; some of the parameters are trained.

    The model is always in evaluation mode. BatchNorm keeps the statistics of the pretrained weights: the head was
    trained on features computed with them, and with statistics of small batches the first step would start from
    another model than the frozen one. The scales and shifts of BatchNorm are trained like other weights. There is no
    dropout, as in the training of the head. Features are standardized as in the frozen model. `seed` is that of LoRA
    adapters. UserError if the head was trained for other images or backbones, or no parameter can be trained.
    """

    def __init__(
        self, images: xr.Dataset, members: Sequence[EnsembleMember], head_path: Path, config: FineTuneConfig,
        seed: int, device: str, precision: str,
    ):  # fmt: skip
        super().__init__()
        self.trained_head = checkpoint.load(head_path, device)
        _check_head_matches_data(self.trained_head, head_path, [member.name for member in members], images)
        self.encoders = []
        for member in members:
            spec = get_spec(member.backbone)
            preprocessor = preprocessing.make_preprocessor(images, member.name, member.backbone, spec)
            network = create_backbone(member.backbone, spec, preprocessor.input_bands, member.weights_dir)
            layers.make_trainable(network, member.name, config, seed)
            network = TrainableBackbone(network)
            self.encoders.append(Encoder(preprocessor, network, device, precision, strides=spec.strides))
        self._metadata = [encoder.preprocessor.metadata(images, slice(None)) for encoder in self.encoders]
        self._layer_decay = 1.0 if config.method == "lora" else config.layer_decay
        self.networks = nn.ModuleList(encoder.network for encoder in self.encoders)
        self.head = self.trained_head.network
        self.eval()
        self._freeze_unused(images.image[:1].values)
        if not any(parameter.requires_grad for parameter in self.networks.parameters()):
            model = self.trained_head.model
            raise UserError(
                f"{model} has no backbone parameters to fine-tune: the head uses no output of those that "
                f"finetune.method '{config.method}' selects. Name another model in grid.finetune, or set "
                "finetune.method to all.",
                key="grid.finetune", value=model,
            )  # fmt: skip

    def forward(self, image: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        """Compute logits (batch, class), or (batch, class, y, x) for segmentation.

        The image is (batch, band, y, x) in the units of the images store; `rows` are the indices of these samples,
        for backbones that use location and time.
        """
        return self.trained_head.logits(self.features(image, rows))

    def features(self, image: np.ndarray, rows: np.ndarray) -> list[dict[str, torch.Tensor]]:
        """Compute each backbone's features by the names of their arrays; arguments as for `forward`."""
        features = []
        for encoder, metadata in zip(self.encoders, self._metadata, strict=True):
            cast(TrainableBackbone, encoder.network).gradients_enabled = torch.is_grad_enabled()
            tensors = {name: torch.from_numpy(values[rows]).to(encoder.device) for name, values in metadata.items()}
            features.append(encoder.forward(encoder.prepare(image), tensors).arrays())
        return features

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def load_trainable(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.trainable_parameters().items():
            parameter.copy_(tensors[name])

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict]:
        """Return parameter groups for torch's AdamW, with a learning rate (`initial_lr`) per layer.

        Biases and normalisation layers have no weight decay.
        """
        lr_scale = {f"head.{name}": 1.0 for name, _ in self.head.named_parameters()}
        for index, network in enumerate(self.networks):
            scales = layers.layer_lr_scale(network, self._layer_decay)
            lr_scale |= {f"networks.{index}.{name}": scale for name, scale in scales.items()}
        # Stacked biases have two dimensions, so the head lists the parameters that decay.
        head_decays = {}
        if self.head.is_stacked:
            head_decays = {id(parameter): decays for parameter, decays in self.head.parameter_heads()}
        groups: dict[tuple[float, bool], list] = {}
        for name, parameter in self.trainable_parameters().items():
            decays = head_decays.get(id(parameter), parameter.ndim > 1)
            groups.setdefault((learning_rate * lr_scale[name], decays), []).append(parameter)
        return [
            {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": weight_decay if decays else 0.0}
            for (rate, decays), parameters in groups.items()
        ]

    def _freeze_unused(self, image: np.ndarray) -> None:
        """Freeze parameters that no logit depends on, such as a network's own classifier."""
        with torch.enable_grad():
            features = self.features(image, np.arange(len(image)))
            _check_head_matches_features(self.trained_head, features)
            parameters = list(self.trainable_parameters().values())
            logits = self.trained_head.logits(features)
            gradients = torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


@contextmanager
def memory_hint() -> Iterator[None]:
    """Turn an out-of-memory error into a UserError that names the options that reduce memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"Memory ran out ({' '.join(str(error).split())[:120]}). Lower finetune.batch, set "
            "finetune.checkpointing to true or finetune.precision to bfloat16, or train less of the backbone: set "
            "finetune.method to lora or last<n>.",
            key="finetune.batch",
        ) from None


def _check_head_matches_data(head: TrainedHead, path: Path, backbones: Sequence[str], images: xr.Dataset) -> None:
    """Refuse a head that was trained for another model, task, classes or mask size."""
    task, classes = images.attrs["task"], images.attrs["classes"]
    checks: dict[str, tuple] = {
        "model": (head.model, "+".join(backbones)),
        "task": (str(head.task), task),
        "classes": (", ".join(head.class_names), ", ".join(classes)),
    }
    if get_task(task).is_dense:
        checks["mask size"] = (tuple(head.config.output_size), tuple(images.label.shape[1:]))
    for name, (actual, expected) in checks.items():
        if actual != expected:
            raise UserError(
                f"The {name} of the head in {path} is {actual}; {expected} is needed. The head was trained on "
                "another dataset or model. Run: dvc repro train",
                key=name, value=actual, allowed=[expected], path=path,
            )  # fmt: skip


def _check_head_matches_features(head: TrainedHead, features: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Refuse features whose arrays or shapes differ from those that the head was trained on."""
    columns = zip(head.backbones, head.array_names, head.config.shapes, features, strict=True)
    for name, array_names, shapes, arrays in columns:
        for array_name, shape in zip(array_names, map(tuple, shapes), strict=True):
            actual = tuple(arrays[array_name].shape[1:]) if array_name in arrays else None
            if actual != shape:
                problem = f"has no {array_name}" if actual is None else f"has {array_name} of shape {actual}"
                raise UserError(
                    f"The head of {head.model} was trained on {array_name} of shape {shape}; the backbone {name} "
                    f"{problem}. Run: dvc repro train",
                    key=array_name, value=actual, allowed=[shape],
                )  # fmt: skip
