"""A model whose backbones are trained: the very way from images to features that extraction goes, and a kept head."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import nn

from pipeline.backbones import create_backbone, get_spec, preprocessing
from pipeline.backbones.base import FeaturePyramid
from pipeline.backbones.encoder import Encoder
from pipeline.config import BackboneConfig, FineTuneConfig
from pipeline.errors import UserError
from pipeline.finetuning import layers, lora
from pipeline.finetuning.fits import check_head_matches_data, check_head_matches_features
from pipeline.heads import checkpoint


@dataclass(frozen=True)
class EnsembleMember:
    """One backbone of a model: its description, and the folder of its weights."""

    name: str
    backbone: BackboneConfig
    weights: Path


class TrainableBackbone(nn.Module):
    """A backbone that gives gradients inside `Encoder`, which allows none.

    So that nothing but an Encoder calls a backbone here either, and inputs are those of extraction.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.gradients = network, False

    def forward(self, image: torch.Tensor, **context: torch.Tensor) -> FeaturePyramid:
        with torch.inference_mode(False), torch.set_grad_enabled(self.gradients):
            return self.network(image, **context)


class FineTunedEnsemble(nn.Module):
    """Backbones and their head, of which some parameters are trained.

    It is always in evaluation mode. BatchNorm so keeps the statistics that the weights came with: the head and its
    standardisation were trained on features made with these, and statistics of small batches would make the start
    another model than the frozen one; its scales and shifts are trained like other weights. Dropout is off, as it was
    for the head. The standardisation of the features is the frozen model's, and is not trained.

    Args:
        opened: the images store.
        members: of the model, in the head's order.
        head: the path of the frozen model's kept head.
        seed: of adapters.
        device, precision: of the backbones, as for `Encoder`.

    Raises:
        UserError: a head that does not belong to these images or backbones, or nothing to train.
    """

    def __init__(
        self,
        opened: xr.Dataset,
        members: Sequence[EnsembleMember],
        head: Path,
        described: FineTuneConfig,
        seed: int,
        device: str,
        precision: str,
    ):
        super().__init__()
        self.trained_head = checkpoint.load(head, device)
        check_head_matches_data(self.trained_head, head, [member.name for member in members], opened)
        self.encoders = [_encoder(member, opened, described, seed, device, precision) for member in members]
        self._context = [encoder.preprocessor.metadata(opened, slice(None)) for encoder in self.encoders]
        self._decay = 1.0 if described.method == "lora" else described.layer_decay
        self.networks = nn.ModuleList(encoder.network for encoder in self.encoders)
        self.head = self.trained_head.network
        self.eval()
        self._leave_unused(opened.image[:1].values)
        if not any(values.requires_grad for values in self.networks.parameters()):
            raise UserError(
                f"{self.trained_head.model} has no parameters to fine-tune: its head reads nothing of those that "
                "finetune.method chooses. Name another model in grid.finetune, or choose all."
            )

    def forward(self, image: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        """Logits (batch, class), or (batch, class, y, x), of images (batch, band, y, x) in the store's units.

        Args:
            rows: which samples of the store they are, for those backbones that want to know where and when.
        """
        return self.trained_head.logits(self.features(image, rows))

    def features(self, image: np.ndarray, rows: np.ndarray) -> list[dict[str, torch.Tensor]]:
        """What each backbone gives, by the names that its arrays have in a store; arguments as for `forward`."""
        features = []
        for encoder, context in zip(self.encoders, self._context, strict=True):
            encoder.network.gradients = torch.is_grad_enabled()
            known = {name: torch.from_numpy(values[rows]).to(encoder.device) for name, values in context.items()}
            features.append(_named(encoder.forward(encoder.prepare(image), known)))
        return features

    def _leave_unused(self, image: np.ndarray) -> None:
        """Not to train, nor to count, what no logit depends on, such as a network's own classifier."""
        with torch.enable_grad():
            features = self.features(image, np.arange(len(image)))
            check_head_matches_features(self.trained_head, features)
            trained = list(self.trainable_parameters().values())
            pulled = torch.autograd.grad(self.trained_head.logits(features).sum(), trained, allow_unused=True)
        for values, gradient in zip(trained, pulled, strict=True):
            values.requires_grad_(gradient is not None)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: values for name, values in self.named_parameters() if values.requires_grad}

    def load_trainable(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set what is trained."""
        with torch.no_grad():
            for name, values in self.trainable_parameters().items():
                values.copy_(tensors[name])

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict]:
        """AdamW's groups: layer by layer its learning rate; biases and normalisation do not decay."""
        stacked = {id(one): decays for one, decays in self.head.parameter_heads()} if self.head.stacked else {}
        share = {f"head.{name}": 1.0 for name, _ in self.head.named_parameters()}
        for place, network in enumerate(self.networks):
            found = layers.layer_lr_scale(network, self._decay)
            share |= {f"networks.{place}.{name}": value for name, value in found.items()}
        made: dict[tuple[float, bool], list] = {}
        for name, values in self.trainable_parameters().items():
            decays = stacked.get(id(values), values.ndim > 1)
            made.setdefault((learning_rate * share[name], decays), []).append(values)
        return [
            {"params": values, "lr": rate, "rate": rate, "weight_decay": weight_decay if decays else 0.0}
            for (rate, decays), values in made.items()
        ]


@contextmanager
def memory_hint():
    """Memory that runs out becomes a UserError that says what would need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not (
            isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        ):
            raise
        raise UserError(
            f"Memory ran out ({' '.join(str(error).split())[:120]}). Lower finetune.batch, set "
            "finetune.checkpointing to true or finetune.precision to bfloat16, or train less of the backbone: "
            "finetune.method lora or last<n>."
        ) from None


def _encoder(
    member: EnsembleMember, opened: xr.Dataset, described: FineTuneConfig, seed: int, device: str, precision: str
) -> Encoder:
    declared = get_spec(member.backbone)
    given = preprocessing.make_preprocessor(opened, member.name, member.backbone, declared)
    network = create_backbone(member.backbone, declared, given.input_bands, member.weights)
    if next(network.parameters(), None) is not None:
        if described.checkpointing:
            layers.enable_checkpointing(network)
        if described.method == "lora":
            lora.add_lora(network, described.rank, seed, member.name)
        else:
            layers.unfreeze(network, described.n_last_blocks, member.name)
    return Encoder(given, TrainableBackbone(network), device, precision, strides=declared.strides)


def _named(pyramid: FeaturePyramid) -> dict[str, torch.Tensor]:
    """Features by the names that their arrays have in a store."""
    levels = {f"level{place}/features": level for place, level in enumerate(pyramid.levels)}
    return levels | {f"pooled/{name}": vector for name, vector in pyramid.pooled.items()}
