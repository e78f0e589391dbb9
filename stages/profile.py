"""profile: a file of profiles/ as changes to params.yaml, which keeps its comments."""

import io
from pathlib import Path

from ruamel.yaml import YAML

from pipeline import config
from pipeline.data import sources
from pipeline.errors import UserError
from stages.cli import run, write_text

PROFILES, PARAMS = Path("profiles"), Path("params.yaml")


def profile(name: str) -> None:
    """Write the changes of profiles/<name>.yaml into params.yaml, if what results is valid."""
    path, yaml = PROFILES / f"{name}.yaml", YAML()
    if not path.exists():
        there = ", ".join(sorted(one.stem for one in PROFILES.glob("*.yaml")))
        raise UserError(f"There is no profile '{name}'. Profiles: {there}.")
    yaml.width, text = 120, io.StringIO()
    yaml.indent(mapping=2, sequence=4, offset=2)
    content = yaml.load(PARAMS.read_text())
    merge(content, yaml.load(path.read_text()))
    yaml.dump(content, text)
    before = PARAMS.read_text()
    write_text(PARAMS, text.getvalue())
    try:
        described = config.load()
        for dataset in described.grid.datasets:
            sources.validate(dataset, described.dataset(dataset))
    except UserError:
        write_text(PARAMS, before)
        raise
    print(f"{PARAMS} is now profile '{name}'; `git checkout {PARAMS}` takes it back.")


def merge(content: dict, change: dict) -> None:
    """Set the keys of `change` in `content`, at any depth; lists are replaced."""
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            merge(content[key], value)
        else:
            content[key] = value


if __name__ == "__main__":
    run(profile, "name")
