"""Checkpoint of a trained head, as maps, students and fine-tuning use it."""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pipeline.errors import UserError
from pipeline.feature_ops import channels_last, standardize_
from pipeline.heads.config import HeadConfig, HeadGroup

# In every file; other formats are refused.
FORMAT = "eo-compose head 2"


@dataclass(frozen=True)
class TrainedHead:
    """One trained head.

    Attributes:
        model: name of the model; its backbones' names joined by `+`.
        task: name of the task (pipeline/tasks.py).
        array_names: names of each backbone's arrays that the head reads, as in its feature store.
        mean_scale: for each of these arrays, the mean to subtract and the factor to multiply by, float32 (channel,).
        network: a group of one head (pipeline/heads), in evaluation mode.
    """

    model: str
    task: str
    class_names: tuple[str, ...]
    array_names: tuple[tuple[str, ...], ...]
    config: HeadConfig
    mean_scale: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    network: HeadGroup

    @property
    def backbones(self) -> list[str]:
        return self.model.split("+")

    def standardize(self, features: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor | list[torch.Tensor]:
        """Standardize features, as for `logits`, to the input of the network; differentiable."""
        members = zip(features, self.array_names, strict=True)
        arrays = [member[name].float().clone() for member, names in members for name in names]
        standardized = [
            standardize_(array, *mean_scale) for array, mean_scale in zip(arrays, self.mean_scale, strict=True)
        ]
        if self.network.is_stacked:
            return torch.cat(standardized, dim=1)
        return [channels_last(level) for level in standardized]

    def logits(self, features: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        """Compute the logits (batch, class), or (batch, class, y, x) of the masks' size.

        Args:
            features: for each backbone, its arrays by name as in the store, not standardized: (batch, channel, …).
        """
        ((_, logits),) = self.network.forward_heads(self.standardize(features), None)
        return logits[0]


def select_head(config: HeadConfig, group: HeadGroup, index: int) -> HeadGroup:
    """Copy one head of a trained group into a new group, on the CPU."""
    if group.is_stacked:
        state = {name: values[index : index + 1] for name, values in group.state_dict().items()}
    else:
        state = {f"heads.0.{name}": values for name, values in group.heads[index].state_dict().items()}
    network = config.create_group([0])
    network.load_state_dict(state)
    return network.eval()


def save(path: Path, head: TrainedHead) -> None:
    torch.save(
        {
            "format": FORMAT,
            "model": head.model,
            "task": str(head.task),
            "class_names": list(head.class_names),
            "array_names": [list(names) for names in head.array_names],
            "config": asdict(head.config),
            "mean_scale": [tuple(values.cpu() for values in pair) for pair in head.mean_scale],
            "state": {name: values.detach().cpu().clone() for name, values in head.network.state_dict().items()},
        },
        path,
    )


def load(path: Path, device: str = "cpu") -> TrainedHead:
    """Read a trained head; no code in the file is run. A missing file or another format raises UserError."""
    if not Path(path).exists():
        raise UserError(f"There is no trained head at {path}. Train it with: dvc repro train", path=path)
    try:
        data = torch.load(path, map_location=device, weights_only=True)
        if data["format"] != FORMAT:
            raise KeyError(data["format"])
        config = HeadConfig(**data["config"])
        network = config.create_group([0])
        network.load_state_dict(data["state"])
        return TrainedHead(
            data["model"],
            data["task"],
            tuple(data["class_names"]),
            tuple(map(tuple, data["array_names"])),
            config,
            tuple((mean, scale) for mean, scale in data["mean_scale"]),
            network.to(device).eval(),
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is not a trained head of the format '{FORMAT}' ({reason}). Run: dvc repro -f train",
            allowed=[FORMAT],
            path=path,
        ) from None
