"""profile: apply the changes in a file of profiles/ to params.yaml, and keep its comments."""

import io
from pathlib import Path

from ruamel.yaml import YAML

from pipeline import config
from pipeline.data import sources
from pipeline.errors import UserError
from stages import cli

PROFILES, PARAMS = Path("profiles"), Path(config.FILE)


def profile(name: str) -> None:
    """Write the changes of profiles/<name>.yaml to params.yaml if the result is valid."""
    path, yaml, text = PROFILES / f"{name}.yaml", YAML(), io.StringIO()
    if not path.exists():
        names = sorted(file.stem for file in PROFILES.glob("*.yaml"))
        message = f"There is no profile '{name}'. Profiles: {', '.join(names)}."
        raise UserError(message, key="name", value=name, allowed=names)
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    previous = PARAMS.read_text()
    content = yaml.load(previous)
    merge(content, yaml.load(path.read_text()))
    yaml.dump(content, text)
    cli.write_text(PARAMS, text.getvalue())
    try:
        params = config.load()
        for dataset in params.grid.datasets:
            sources.validate(dataset, params.dataset(dataset))
    except UserError:
        cli.write_text(PARAMS, previous)
        raise
    print(f"{PARAMS} now has profile '{name}'; `git checkout {PARAMS}` restores it.")


def merge(content: dict, change: dict) -> None:
    """Set the keys of `change` in `content`, at any depth; lists are replaced."""
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            merge(content[key], value)
        else:
            content[key] = value


if __name__ == "__main__":
    cli.run(profile)
