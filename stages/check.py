"""check: params.yaml is read and refused before anything else runs."""

from pathlib import Path

from pipeline import datasets, params
from pipeline.backbones import spec
from stages.cli import DISTILLED, run, write_json


def check() -> None:
    """Check every key, name and value of params.yaml."""
    described = params.load()
    for name, dataset in described.datasets.items():
        datasets.check(name, dataset)
    for backbone in described.backbones.values():
        spec(backbone)
    # The same content every time: later stages depend on this file's existence alone.
    # One is where students will be, so that the folder that later stages read is there without any.
    for path in (Path("data/params.checked"), DISTILLED / "params.checked"):
        write_json(path, {"params.yaml": "checked"})


if __name__ == "__main__":
    run(check)
