"""train: train a model's heads with the best hyperparameters and score them on the test split.

Only this stage, finetune and distill read the test split, once per seed.
"""

from pathlib import Path

import pandas as pd

from cache.atomic import atomic_dir
from pipeline import config
from pipeline.errors import UserError
from stages.cli import (
    HEADS,
    IMAGES,
    MODELS,
    RUNS,
    SCRATCH,
    SELECTED,
    SELECTED_RUNS,
    SELECTED_TUNING,
    TUNING,
    feature_stores,
    read_json,
    run,
    write_json,
)


def train(dataset: str, model: str | None, selected: bool) -> None:
    """Write results/runs/<dataset>/<model> and results/heads/<dataset>/<model>.

    runs.csv has one row per seed, predictions.parquet one row per seed and test sample, head.pt the best head on
    validation. With --selected, write results/train_selected/<dataset>, with a folder of these three files for each
    ensemble that the composition search selected.
    """
    params = config.load()
    params.dataset(dataset)
    if bool(model) == selected:
        raise UserError("Name one of the grid's models by --model, or give --selected.", key="model", value=model)
    if selected:
        tuned = read_json(SELECTED_TUNING / f"{dataset}.json")
        with atomic_dir(SCRATCH / f"selected-{dataset}", SELECTED_RUNS / dataset) as folder:
            for resolved in read_json(SELECTED / f"{dataset}.json"):
                name = resolved["model"]
                (folder / name).mkdir()
                _train(params, resolved, tuned[name], folder / name, folder / name)
            write_json(folder / "models.json", list(tuned))  # the folder is never empty
        return
    params.members(model)
    resolved = read_json(MODELS / dataset / f"{model}.json")
    tuned = read_json(TUNING / dataset / f"{model}.json")
    with (
        atomic_dir(SCRATCH / f"runs-{dataset}-{model}", RUNS / dataset / model) as runs_folder,
        atomic_dir(SCRATCH / f"heads-{dataset}-{model}", HEADS / dataset / model) as head_folder,
    ):
        if resolved["skipped"]:
            pd.DataFrame(columns=["dataset", "model"]).to_csv(runs_folder / "runs.csv", index=False)
            write_json(head_folder / "skipped.json", resolved["skipped"])
        else:
            _train(params, resolved, tuned, runs_folder, head_folder)


def _train(params: config.Params, resolved: dict, tuned: dict, runs_folder: Path, head_folder: Path) -> None:
    """Train the heads of a resolved model and write its runs, predictions and best head."""
    # torch takes 3 s to import; a skipped model needs none of it
    from pipeline.device import resolve_device
    from pipeline.heads import checkpoint
    from pipeline.training import protocol, task_data

    dataset, model = resolved["dataset"], resolved["model"]
    device = resolve_device(params.compute.device)
    stores, images_path = feature_stores(resolved), IMAGES / f"{dataset}.zarr"
    data = task_data.load(stores, images_path, params.heads, ("train", "val", "test"), device)
    weights = "+".join(str(member["weights"]) for member in resolved["members"])
    row = {"dataset": dataset, "model": model, "weights": weights}
    result = protocol.train_and_test(data, tuned["best"], params.train.seeds, row)
    result.runs.to_csv(runs_folder / "runs.csv", index=False)
    result.predicted.to_parquet(runs_folder / "predictions.parquet")
    checkpoint.save(head_folder / "head.pt", protocol.trained_head(data, model, result.group, result.best_index))
    print(f"{dataset} {model}: test {result.runs.score.mean():.4f}, mean of {len(result.runs)} seeds", flush=True)


if __name__ == "__main__":
    run(train, "dataset", flags={"selected": "train the ensembles that the composition search selected"},
        options={"model": "a model of grid.models"})  # fmt: skip
