"""The section `finetune` of params.yaml."""

import re
from dataclasses import dataclass

from pipeline.errors import UserError

_LAST = re.compile(r"last([1-9]\d*)")


@dataclass(frozen=True)
class FineTuneConfig:
    """How backbones are trained on, from the frozen model.

    Attributes:
        what: `all` layers, `lora` (adapters, of `rank`), or `last<n>`: the last n blocks, such as `last2`.
        learning_rates: each is tried with the first seed, and the best on validation is used for all seeds; of the
            head and of adapters, and, times `decay`, of the last block, times its square of the one before, …
        decay: layer-wise, in (0, 1]; 1 gives every layer one rate. Adapters all have the full rate.
        weight_decay: of AdamW, on weights; not on biases and normalisation.
        steps, batch: updates, and images in each.
        checks: on validation, in all steps; each is also the point at which a killed run goes on.
        seeds: of the order of images, their augmentation, and the adapters.
        augment: each image and its mask flipped and turned at random, by the symmetries of a square.
        checkpointing: activations are computed again for the gradients instead of being kept.
        precision: of the backbones: `auto` is bfloat16 on a GPU, else float32; or either by name.
    """

    what: str = "all"
    rank: int = 8
    learning_rates: tuple[float, ...] = (3e-5, 3e-4)
    decay: float = 0.75
    weight_decay: float = 0.05
    steps: int = 200
    batch: int = 16
    checks: int = 10
    seeds: int = 3
    augment: bool = True
    checkpointing: bool = False
    precision: str = "auto"

    @property
    def last(self) -> int:
        """How many of the last blocks are trained; 0 if that is not what is asked."""
        found = _LAST.fullmatch(self.what)
        return int(found[1]) if found else 0

    @property
    def protocol(self) -> str:
        """What its scores are marked with."""
        return f"fine-tuned ({f'last {self.last} blocks' if self.last else self.what})"


def check(described: FineTuneConfig) -> None:
    """Refuse values that mean nothing.

    Raises:
        UserError: the key, what it is, and what it may be.
    """
    if described.what not in ("all", "lora") and not described.last:
        raise UserError(
            f"finetune.what is '{described.what}'; it must be one of: all, lora, or last and a number of blocks, "
            "such as last2."
        )
    if described.precision not in ("auto", "float32", "bfloat16"):
        raise UserError(f"finetune.precision is '{described.precision}'; it must be one of: auto, float32, bfloat16.")
    for key in ("rank", "steps", "batch", "checks", "seeds"):
        if getattr(described, key) < 1:
            raise UserError(f"finetune.{key} is {getattr(described, key)}; it must be at least 1.")
    rates = described.learning_rates
    if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
        raise UserError(
            f"finetune.learning_rates is {list(rates)}; it must name at least one, each once and each above 0."
        )
    if not 0 < described.decay <= 1:
        raise UserError(f"finetune.decay is {described.decay}; it must be above 0 and at most 1.")
    if described.weight_decay < 0:
        raise UserError(f"finetune.weight_decay is {described.weight_decay}; it must not be negative.")
