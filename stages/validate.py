"""validate: check params.yaml before any other stage runs."""

import difflib
from collections.abc import Mapping
from pathlib import Path

from pipeline import config
from pipeline.backbones import get_spec
from pipeline.data import sources
from pipeline.errors import UserError
from stages import cli


def validate(schema: bool) -> None:
    """Check every key, name and value of params.yaml.

    Write params.schema.json (with --schema only that), and a grid.json with the requested names to each folder of
    results that may stay empty. The folders must exist, because later stages depend on them as a whole.
    """
    cli.write_text(Path(config.SCHEMA_FILE), config.json_schema())
    if schema:
        return
    params = config.load()
    for name, dataset in params.datasets.items():
        sources.validate(name, dataset)
    # torch takes 3 s to import; a mistake in params.yaml is reported before that
    from pipeline.heads import get_head
    from pipeline.heads.fusion import get_fusion

    heads = params.heads
    get_head(heads.segmentation)
    heads.settings(heads.segmentation)
    get_fusion(heads.fusion)
    specs = {name: get_spec(backbone) for name, backbone in params.backbones.items()}
    for name in dict.fromkeys(name for model in params.grid.models for name in params.members(model)):
        if params.backbone(name).weights != "none":  # a baseline without weights has pooled features only
            _check_levels(heads, name, specs[name].layers)
    _check_networks({name: params.student(name).network for name in params.grid.students})
    datasets, students = list(params.grid.datasets), list(params.grid.students)
    for folder in (cli.EXPORTS, cli.MAPS):
        cli.write_json(folder / "grid.json", {"datasets": datasets, "students": students})
    cli.write_json(cli.FINETUNING / "grid.json", {"datasets": datasets, "models": list(params.grid.finetune)})


def _check_levels(heads: config.HeadsConfig, name: str, layers: tuple[str, ...]) -> None:
    allowed = range(-len(layers), len(layers))
    for level in heads.levels:
        if level not in allowed:
            raise UserError(
                f"heads.levels has level {level}, but {name} has {len(layers)} levels. Choose from 0 (finest) to "
                f"{len(layers) - 1}, or count from -1, the deepest; or remove {name} from grid.models.",
                key="heads.levels", value=level, allowed=allowed, path=config.FILE,
            )  # fmt: skip


def _check_networks(networks: Mapping[str, str]) -> None:
    """Refuse students whose folder of results is another's, and networks that timm does not have."""
    if "teacher" in networks:
        raise UserError(
            "A student cannot have the name 'teacher', because results/distill/<dataset>/teacher holds its teacher. "
            "Choose another name under 'students' in params.yaml.",
            key="grid.students", value="teacher", path=config.FILE,
        )  # fmt: skip
    if not networks:
        return
    # timm takes 3 s to import; a grid without students needs none of it
    import timm

    for name, network in networks.items():
        if not timm.is_model(network):
            similar = difflib.get_close_matches(network, timm.list_models(), n=6)
            raise UserError(
                f"students.{name}.network is '{network}', which timm does not have. Similar networks: "
                f"{', '.join(similar) or 'none'}. Choose one that timm.list_models() lists.",
                key=f"students.{name}.network", value=network, allowed=similar, path=config.FILE,
            )  # fmt: skip


if __name__ == "__main__":
    cli.run(validate)
