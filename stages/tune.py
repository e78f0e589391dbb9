"""tune: the search for a model's learning rate and weight decay, on train and validation alone."""

from dataclasses import asdict

from pipeline import config
from stages.cli import FEATURES, IMAGES, MODELS, SCRATCH, TUNED, read_json, run, write_json


def tune(dataset: str, model: str) -> None:
    """Write results/tune/<dataset>/<model>.json."""
    described = config.load()
    described.dataset(dataset)
    described.members(model)
    resolved = read_json(MODELS / dataset / f"{model}.json")
    study = SCRATCH / "studies" / f"{dataset}-{model}.json"
    result = {"dataset": dataset, "model": model, "skipped": resolved["skipped"]}
    if not resolved["skipped"]:
        from pipeline.device import resolve_device
        from pipeline.training import protocol, task_data

        stores = {
            FEATURES / dataset / f"{member['backbone']}.zarr": member["content_sha256"]
            for member in resolved["members"]
        }
        where = resolve_device(described.compute.device)
        cell = task_data.load(stores, IMAGES / f"{dataset}.zarr", described.heads, ("train", "val"), where)
        about = [resolved, asdict(described.heads), where]
        result |= protocol.tune(cell, described.search, f"{dataset} {model}", study, about)
    write_json(TUNED / dataset / f"{model}.json", result)
    study.unlink(missing_ok=True)


if __name__ == "__main__":
    run(tune, "dataset", "model")
