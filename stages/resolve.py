"""resolve: list the feature stores of every model, and the settings of its head."""

from dataclasses import asdict

import zarr

from pipeline import config
from pipeline.composition import CompositionResult
from pipeline.tasks import get_task
from stages import cli


def resolve(dataset: str) -> None:
    """Write data/models/<dataset>/<model>.json and data/selected/<dataset>.json.

    The first is of every model of the grid. The second lists the ensembles that the composition search selected and
    the grid lacks. The stages that train heads depend on these files: they hold what decides a head's inputs and
    settings, and nothing else of params.yaml.
    """
    params = cli.load_params(dataset)
    is_dense = get_task(zarr.open_group(cli.images_path(dataset), mode="r").attrs["task"]).is_dense
    head = _head_settings(params.heads, is_dense)
    with cli.publish_folder(cli.MODELS / dataset) as folder:
        for model in params.grid.models:
            cli.write_json(folder / f"{model}.json", _resolve(dataset, model, params.members(model), head))
    selected = CompositionResult.read(cli.COMPOSITION / dataset).missing_from(params.grid.models)
    models = [_resolve(dataset, name, name.split("+"), head) for name in selected]
    cli.write_json(cli.SELECTED / f"{dataset}.json", models)


def _resolve(dataset: str, model: str, backbones: list[str], head: dict) -> dict:
    """Describe a model: why it is skipped, its backbones with the digests of their features, and its head."""
    members, reasons = [], []
    for name in backbones:
        manifest = cli.read_json(cli.MANIFESTS / dataset / f"{name}.json")
        digest, weights = manifest.get("content_sha256"), manifest.get("weights", {}).get("weights")
        members.append({"backbone": name, "content_sha256": digest, "weights": weights})
        reasons += [manifest["skipped"]] if manifest["skipped"] else []
    skipped = " ".join(reasons) or None
    return {"dataset": dataset, "model": model, "skipped": skipped, "members": members, "head": head}


def _head_settings(heads: config.HeadsConfig, is_dense: bool) -> dict:
    """Return the settings of the head that a task uses, without those of other heads."""
    name = heads.segmentation if is_dense else "linear"
    shared = {key: value for key, value in asdict(heads).items() if not isinstance(value, dict)}
    del shared["segmentation"]
    return {"name": name, "settings": asdict(heads.settings(name)), **shared}


if __name__ == "__main__":
    cli.run(resolve)
