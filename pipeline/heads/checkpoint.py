"""A trained head in a file, with all that it needs to be used again: on a map, by a student, in fine-tuning.

Of a model's seeds the one that is best on validation is kept, so that test scores choose nothing.
"""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pipeline.errors import UserError
from pipeline.heads.config import HeadConfig
from pipeline.training.feature_inputs import standardise
from pipeline.training.feature_loader import channels_last
from pipeline.training.task_data import TaskData

# In every file; a reader refuses others.
FORMAT = "eo-compose head 1"


@dataclass(frozen=True)
class TrainedHead:
    """One trained head.

    Attributes:
        model: its name; `backbones` are those of its members, in order.
        task: `classification`, `multilabel` or `segmentation`.
        classes: their names.
        fields: of each member, the names of the store's arrays that the head reads.
        by: of each of these, what is taken off and what is multiplied by, float32 (channel,).
        network: a group of one head (pipeline/heads), evaluating.
    """

    model: str
    task: str
    class_names: tuple[str, ...]
    array_names: tuple[tuple[str, ...], ...]
    config: HeadConfig
    mean_scale: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    network: torch.nn.Module

    @property
    def backbones(self) -> list[str]:
        return self.model.split("+")

    def standardize(self, features: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor | list[torch.Tensor]:
        """What `network.pieces` takes, from what `logits` takes; differentiable in the features."""
        values = [member[name].float() for member, names in zip(features, self.array_names, strict=True) for name in names]
        fresh = [standardise(value.clone(), *by) for value, by in zip(values, self.mean_scale, strict=True)]
        return torch.cat(fresh, dim=1) if self.network.stacked else [channels_last(level) for level in fresh]

    def logits(self, features: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        """Logits (batch, class), or (batch, class, y, x) of the masks' size.

        Args:
            features: of each member, its arrays by name as in the store, not standardised: (batch, channel, …).
        """
        ((_, logits),) = self.network.pieces(self.standardize(features), None)
        return logits[0]


def save(path: Path, model: str, cell: TaskData, group: torch.nn.Module, head: int) -> None:
    """Write one head of a trained group.

    Args:
        head: its place in the group.
    """
    one = cell.blueprint.create_group([0])
    if group.stacked:
        state = {name: values[head : head + 1] for name, values in group.state_dict().items()}
    else:
        state = {f"heads.0.{name}": values for name, values in group.heads[head].state_dict().items()}
    one.load_state_dict(state)
    torch.save(
        {
            "format": FORMAT,
            "model": model,
            "task": cell.task.type,
            "classes": cell.names,
            "fields": cell.fields,
            "blueprint": asdict(cell.blueprint),
            "by": [tuple(torch.as_tensor(value) for value in by) for by in cell.by],
            "state": {name: values.detach().cpu().clone() for name, values in one.state_dict().items()},
        },
        path,
    )


def load(path: Path, device: str = "cpu") -> TrainedHead:
    """Read what `save` wrote; nothing in the file is run.

    Raises:
        UserError: no such file, or not one of these.
    """
    if not Path(path).exists():
        raise UserError(f"There is no trained head at {path}. Train it with: dvc repro train")
    try:
        read = torch.load(path, map_location=device, weights_only=True)
        if read["format"] != FORMAT:
            raise KeyError(read["format"])
        blueprint = HeadConfig(**read["blueprint"])
        network = blueprint.create_group([0])
        network.load_state_dict(read["state"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is no head that train has kept ({reason}). Run: dvc repro -f train") from None
    fields, classes = tuple(map(tuple, read["fields"])), tuple(read["classes"])
    by = tuple((mean, scale) for mean, scale in read["by"])
    return TrainedHead(read["model"], read["task"], classes, fields, blueprint, by, network.to(device).eval())
