"""tune: search for a model's learning rate and weight decay on the train and validation splits."""

from pipeline import config
from pipeline.errors import UserError
from stages.cli import (
    IMAGES,
    MODELS,
    SCRATCH,
    SELECTED,
    SELECTED_TUNING,
    TUNING,
    feature_stores,
    read_json,
    run,
    write_json,
)


def tune(dataset: str, model: str | None, selected: bool) -> None:
    """Write results/tune/<dataset>/<model>.json.

    With --selected, write results/tune_selected/<dataset>.json, by ensemble that the composition search selected.
    """
    params = config.load()
    params.dataset(dataset)
    if bool(model) == selected:
        raise UserError("Name one of the grid's models by --model, or give --selected.", key="model", value=model)
    if selected:
        resolved = read_json(SELECTED / f"{dataset}.json")
        write_json(SELECTED_TUNING / f"{dataset}.json", {entry["model"]: _tune(params, entry) for entry in resolved})
    else:
        params.members(model)
        result = _tune(params, read_json(MODELS / dataset / f"{model}.json"))
        write_json(TUNING / dataset / f"{model}.json", result)


def _tune(params: config.Params, resolved: dict) -> dict:
    """Search for the hyperparameters of a resolved model."""
    dataset, model = resolved["dataset"], resolved["model"]
    result = {"dataset": dataset, "model": model, "skipped": resolved["skipped"]}
    if resolved["skipped"]:
        return result
    # torch takes 3 s to import; a skipped model needs none of it
    from pipeline.device import resolve_device
    from pipeline.training import protocol, task_data

    device = resolve_device(params.compute.device)
    stores, images_path = feature_stores(resolved), IMAGES / f"{dataset}.zarr"
    data = task_data.load(stores, images_path, params.heads, ("train", "val"), device)
    study_path = SCRATCH / "studies" / f"{dataset}-{model}.json"
    result |= protocol.tune(data, params.search, f"{dataset} {model}", study_path, [resolved, device])
    study_path.unlink(missing_ok=True)
    return result


if __name__ == "__main__":
    run(tune, "dataset", flags={"selected": "tune the ensembles that the composition search selected"},
        options={"model": "a model of grid.models"})  # fmt: skip
