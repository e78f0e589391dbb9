"""check: params.yaml is read and refused before anything else runs."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from pipeline import config
from pipeline.backbones import get_spec
from pipeline.data import sources
from pipeline.errors import UserError
from stages.cli import DISTILLED, EXPORTED, FINETUNED, MAPS, run, write_json


def check() -> None:
    """Check every key, name and value of params.yaml."""
    described = config.load()
    for name, dataset in described.datasets.items():
        sources.validate(name, dataset)
    layers = {name: get_spec(backbone).layers for name, backbone in described.backbones.items()}
    for name in {name: None for model in described.grid.models for name in described.members(model)}:
        if described.backbone(name).weights != "none":  # a baseline's one pooled vector is of no level
            _check_levels(described.heads.levels, name, layers[name])
    _check_networks({name: described.students[name].network for name in described.grid.students})
    # The same content every time: later stages depend on this file's existence alone.
    # Some are where students will be, so that the folders that later stages read are there without any.
    for folder in (Path("data"), DISTILLED, EXPORTED, MAPS):
        write_json(folder / "params.checked", {"params.yaml": "checked"})
    write_json(FINETUNED / "models.json", list(described.grid.finetune))


def _check_levels(levels: Iterable[int], name: str, layers: tuple[str, ...]) -> None:
    if wrong := [level for level in levels if not -len(layers) <= level < len(layers)]:
        raise UserError(
            f"heads.levels asks for level {wrong[0]}, and {name} has {len(layers)}. Choose from 0 (finest) to "
            f"{len(layers) - 1}, or count from -1, the deepest; or take {name} out of grid.models."
        )


def _check_networks(students: dict[str, str]) -> None:
    if not students:
        return
    import timm  # takes seconds

    for name, network in students.items():
        if not timm.is_model(network):
            near = ", ".join(difflib.get_close_matches(network, timm.list_models(), n=6)) or "none"
            raise UserError(
                f"students.{name}.network is '{network}', which timm does not have. Similar ones: {near}."
            )


if __name__ == "__main__":
    run(check)
