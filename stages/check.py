"""check: params.yaml is read and refused before anything else runs."""

from pathlib import Path

from pipeline import datasets, params
from pipeline.backbones import spec
from stages.cli import DISTILLED, EXPORTED, FINETUNED, MAPS, run, write_json


def check() -> None:
    """Check every key, name and value of params.yaml."""
    described = params.load()
    for name, dataset in described.datasets.items():
        datasets.check(name, dataset)
    for backbone in described.backbones.values():
        spec(backbone)
    # The same content every time: later stages depend on this file's existence alone.
    # Some are where students will be, so that the folders that later stages read are there without any.
    for folder in (Path("data"), DISTILLED, EXPORTED, MAPS):
        write_json(folder / "params.checked", {"params.yaml": "checked"})
    write_json(FINETUNED / "models.json", list(described.grid.finetune))


if __name__ == "__main__":
    run(check)
