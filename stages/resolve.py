"""resolve: list the feature stores of every model, and the settings of its head."""

from dataclasses import asdict

import zarr

from cache.atomic import atomic_dir
from pipeline import config
from pipeline.composition import CompositionResult
from pipeline.tasks import get_task
from stages.cli import COMPOSITION, IMAGES, MANIFESTS, MODELS, SCRATCH, SELECTED, read_json, run, write_json


def resolve(dataset: str) -> None:
    """Write data/models/<dataset>/<model>.json and data/selected/<dataset>.json.

    The first is of every model of the grid. The second lists the ensembles that the composition search selected and
    the grid lacks. The stages that train heads depend on these files: they hold what decides a head's inputs and
    settings, and nothing else of params.yaml.
    """
    params = config.load()
    params.dataset(dataset)
    is_dense = get_task(zarr.open_group(IMAGES / f"{dataset}.zarr", mode="r").attrs["task"]).is_dense
    head = _head_settings(params.heads, is_dense)
    with atomic_dir(SCRATCH / f"models-{dataset}", MODELS / dataset) as folder:
        for model in params.grid.models:
            write_json(folder / f"{model}.json", _resolve(dataset, model, params.members(model), head))
    selected = CompositionResult.read(COMPOSITION / dataset).missing_from(params.grid.models)
    write_json(SELECTED / f"{dataset}.json", [_resolve(dataset, name, name.split("+"), head) for name in selected])


def _resolve(dataset: str, model: str, backbones: list[str], head: dict) -> dict:
    """Describe a model: why it is skipped, its backbones with the digests of their features, and its head."""
    manifests = {name: read_json(MANIFESTS / dataset / f"{name}.json") for name in backbones}
    reasons = [manifest["skipped"] for manifest in manifests.values() if manifest["skipped"]]
    members = [
        {
            "backbone": name,
            "content_sha256": manifest.get("content_sha256"),
            "weights": manifest.get("weights", {}).get("weights"),
        }
        for name, manifest in manifests.items()
    ]
    return {
        "dataset": dataset,
        "model": model,
        "skipped": " ".join(reasons) or None,
        "members": members,
        "head": head,
    }


def _head_settings(heads: config.HeadsConfig, is_dense: bool) -> dict:
    """Return the settings of the head that a task uses, without those of other heads."""
    name = heads.segmentation if is_dense else "linear"
    shared = {key: value for key, value in asdict(heads).items() if not isinstance(value, dict)}
    del shared["segmentation"]
    return {"name": name, "settings": asdict(heads.settings(name)), **shared}


if __name__ == "__main__":
    run(resolve, "dataset")
