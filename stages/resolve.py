"""resolve: list the feature stores of every model, with their digests."""

from cache.atomic import atomic_dir
from pipeline import config
from stages.cli import MANIFESTS, MODELS, SCRATCH, read_json, run, write_json


def resolve(dataset: str) -> None:
    """Write data/models/<dataset>/<model>.json for every model of the grid."""
    params = config.load()
    params.dataset(dataset)
    with atomic_dir(SCRATCH / f"models-{dataset}", MODELS / dataset) as folder:
        for model in params.grid.models:
            manifests = {name: read_json(MANIFESTS / dataset / f"{name}.json") for name in params.members(model)}
            reasons = [manifest["skipped"] for manifest in manifests.values() if manifest["skipped"]]
            members = [
                {
                    "backbone": name,
                    "content_sha256": manifest.get("content_sha256"),
                    "weights": manifest.get("weights", {}).get("weights"),
                }
                for name, manifest in manifests.items()
            ]
            write_json(
                folder / f"{model}.json",
                {"dataset": dataset, "model": model, "skipped": " ".join(reasons) or None, "members": members},
            )


if __name__ == "__main__":
    run(resolve, "dataset")
