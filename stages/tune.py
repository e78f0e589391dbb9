"""tune: search for a model's learning rate and weight decay on the train and validation splits."""

from pipeline import config
from stages import cli


def tune(dataset: str, model: str | None, selected: bool) -> None:
    """Write results/tune/<dataset>/<model>.json.

    With --selected, write results/tune_selected/<dataset>.json, by ensemble that the composition search selected.
    """
    params = cli.load_params(dataset)
    if selected:
        resolved = cli.read_json(cli.SELECTED / f"{dataset}.json")
        results = {entry["model"]: _tune(params, entry) for entry in resolved}
        cli.write_json(cli.SELECTED_TUNING / f"{dataset}.json", results)
    else:
        params.members(model)
        result = _tune(params, cli.read_json(cli.MODELS / dataset / f"{model}.json"))
        cli.write_json(cli.TUNING / dataset / f"{model}.json", result)


def _tune(params: config.Params, resolved: dict) -> dict:
    """Search for the hyperparameters of a resolved model."""
    dataset, model = resolved["dataset"], resolved["model"]
    result = {"dataset": dataset, "model": model, "skipped": resolved["skipped"]}
    if resolved["skipped"]:
        return result
    # torch takes 3 s to import; a skipped model needs none of it
    from pipeline.training import protocol

    data, device = cli.load_task_data(params, resolved, ("train", "val"))
    result["classes"] = data.class_names
    study_path = cli.SCRATCH / "studies" / f"{dataset}-{model}.json"
    result |= protocol.tune(data, params.search, f"{dataset} {model}", study_path, [resolved, device])
    study_path.unlink(missing_ok=True)
    return result


if __name__ == "__main__":
    cli.run(tune, exactly_one=("model", "selected"))
