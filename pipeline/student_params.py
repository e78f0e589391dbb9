"""The sections `students`, `distill` and `search` of params.yaml as frozen, typed records."""

import math
from dataclasses import dataclass

from pipeline.errors import UserError

# What a student may learn from besides labels, by the name of the variant. The first and the last are always run.
VARIANTS = {
    "distilled": ("features", "logits"),
    "features": ("features",),
    "logits": ("logits",),
    "labels": (),
}


@dataclass(frozen=True)
class StudentConfig:
    """A compact network of timm.

    `network` is timm's name. `weights` is `random`, or the name of a backbone of the table above that has the same
    network: the student then starts from that backbone's trained weights. Chips are resized to a side of `chip_size`
    pixels inside the student, those that masks are made of to `mask_size`.
    """

    network: str
    weights: str
    chip_size: int
    mask_size: int


@dataclass(frozen=True)
class StepsConfig:
    """`steps` of `batch` chips each."""

    steps: int
    batch: int


@dataclass(frozen=True)
class SearchConfig:
    """`learning_rate` and `weight_decay` are [low, high], searched on a logarithmic scale.

    `parallel` trials are asked for and trained together, in one pass over the features.
    """

    trials: int
    parallel: int
    seed: int
    learning_rate: tuple[float, ...]
    weight_decay: tuple[float, ...]


@dataclass(frozen=True)
class DistillConfig:
    """How students are trained.

    `datasets` are those of the grid's that students learn, or none for all. `teacher` is a model of the grid, or
    `best`: the one with the best validation score. `labels`, `features` and
    `logits` are the weights of the three losses, `temperature` that of the logits. `ablation` names variants that are
    trained besides the student that learns from everything and the one that learns from labels alone: `features`,
    `logits`, which is labels and that. `chips` and `masks` are how long to train, by what a label is of.
    """

    datasets: tuple[str, ...]
    teacher: str
    labels: float
    features: float
    logits: float
    temperature: float
    ablation: tuple[str, ...]
    chips: StepsConfig
    masks: StepsConfig
    seeds: int
    search: SearchConfig

    def teaches(self, dataset: str) -> bool:
        """Whether students learn a data set."""
        return not self.datasets or dataset in self.datasets

    @property
    def variants(self) -> list[str]:
        """Those that are trained."""
        return [name for name in VARIANTS if name in ("distilled", "labels", *self.ablation)]


def check(students: dict[str, StudentConfig], distill: DistillConfig, grid, backbones) -> None:
    """Refuse names and numbers that could not be trained.

    Raises:
        UserError: saying which key, and what it may be.
    """
    if len(set(grid.students)) != len(grid.students):
        raise UserError(f"grid.students is {list(grid.students)}; name each once.")
    for name in grid.students:
        if name not in students:
            raise UserError(
                f"There is no student '{name}'. params.yaml describes: {', '.join(students) or 'none'}. Use one of "
                f"these, or describe '{name}' under 'students:' first."
            )
        weights = students[name].weights
        if weights != "random" and weights not in grid.backbones:
            raise UserError(
                f"students.{name}.weights is '{weights}'; it must be random, or a backbone of the grid "
                f"({', '.join(grid.backbones)}), so that its weights are fetched."
            )
        if weights != "random" and backbones[weights].weights != "pretrained":
            raise UserError(f"students.{name}.weights is '{weights}', which has no trained weights. Use random.")
    if distill.teacher != "best" and distill.teacher not in grid.models:
        raise UserError(
            f"distill.teacher is '{distill.teacher}', which is not in grid.models ({', '.join(grid.models)}), so it "
            "has no trained head. Add it there, or set best."
        )
    if wrong := set(distill.ablation) - {"features", "logits"}:
        raise UserError(f"distill.ablation names '{min(wrong)}'; it may name features and logits.")
    _check_numbers(students, distill)


def _check_numbers(students: dict[str, StudentConfig], distill: DistillConfig) -> None:
    for key in ("labels", "features", "logits"):
        if getattr(distill, key) < 0:
            raise UserError(f"distill.{key} is {getattr(distill, key)}; a loss's weight must not be negative.")
    if not distill.labels:
        raise UserError("distill.labels is 0; the student from labels alone, the control, would learn nothing.")
    if distill.temperature <= 0:
        raise UserError(f"distill.temperature is {distill.temperature}; it must be above 0.")
    counts = {f"distill.{kind}.{key}": getattr(getattr(distill, kind), key)
              for kind in ("chips", "masks") for key in ("steps", "batch")}  # fmt: skip
    counts |= {f"students.{name}.{key}": getattr(one, key)
               for name, one in students.items() for key in ("chip_size", "mask_size")}  # fmt: skip
    for key, value in (counts | {"distill.seeds": distill.seeds}).items():
        least = 2 if key.endswith("batch") else 1
        if value < least:
            why = ", since BatchNorm cannot train on one sample" if least == 2 else ""
            raise UserError(f"{key} is {value}; it must be at least {least}{why}.")
    check_search("distill.search", distill.search)


def check_search(section: str, search: SearchConfig) -> None:
    """Refuse numbers of trials and bounds that could not be searched."""
    for key, least in (("trials", 1), ("parallel", 1), ("seed", 0)):
        if (value := getattr(search, key)) < least:
            what = "must not be negative" if least == 0 else "must be at least 1"
            raise UserError(f"{section}.{key} is {value}; it {what}.")
    for key in ("learning_rate", "weight_decay"):
        bounds = getattr(search, key)
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < math.inf:
            raise UserError(f"{section}.{key} is {list(bounds)}; it must be [low, high] with 0 < low <= high.")
