"""tune: search for a model's learning rate and weight decay on the train and validation splits."""

from dataclasses import asdict

from pipeline import config
from stages.cli import FEATURES, IMAGES, MODELS, SCRATCH, TUNING, read_json, run, write_json


def tune(dataset: str, model: str) -> None:
    """Write results/tune/<dataset>/<model>.json."""
    params = config.load()
    params.dataset(dataset)
    params.members(model)
    resolved = read_json(MODELS / dataset / f"{model}.json")
    study_path = SCRATCH / "studies" / f"{dataset}-{model}.json"
    result = {"dataset": dataset, "model": model, "skipped": resolved["skipped"]}
    if not resolved["skipped"]:
        # torch takes 3 s to import; a skipped model needs none of it
        from pipeline.device import resolve_device
        from pipeline.training import protocol, task_data

        stores = {
            FEATURES / dataset / f"{member['backbone']}.zarr": member["content_sha256"]
            for member in resolved["members"]
        }
        device = resolve_device(params.compute.device)
        data = task_data.load(stores, IMAGES / f"{dataset}.zarr", params.heads, ("train", "val"), device)
        cache_key = [resolved, asdict(params.heads), device]
        result |= protocol.tune(data, params.search, f"{dataset} {model}", study_path, cache_key)
    write_json(TUNING / dataset / f"{model}.json", result)
    study_path.unlink(missing_ok=True)


if __name__ == "__main__":
    run(tune, "dataset", "model")
