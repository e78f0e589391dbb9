"""train: train a model's heads with the best hyperparameters and score them on the test split.

Only this stage, finetune and distill read the test split, once per seed.
"""

from pathlib import Path

from pipeline import config
from stages import cli


def train(dataset: str, model: str | None, selected: bool) -> None:
    """Write results/runs/<dataset>/<model> and results/heads/<dataset>/<model>.

    runs.csv has one row per seed, predictions.parquet one row per seed and test sample, head.pt the best head on
    validation. With --selected, write results/train_selected/<dataset>, with a folder of these three files for each
    ensemble that the composition search selected.
    """
    params = cli.load_params(dataset)
    if selected:
        tuned = cli.read_json(cli.SELECTED_TUNING / f"{dataset}.json")
        with cli.publish_folder(cli.SELECTED_RUNS / dataset) as folder:
            for resolved in cli.read_json(cli.SELECTED / f"{dataset}.json"):
                name = resolved["model"]
                (folder / name).mkdir()
                _train(params, resolved, tuned[name], folder / name, folder / name)
            cli.write_json(folder / "models.json", list(tuned))  # the folder is never empty
        return
    params.members(model)
    resolved = cli.read_json(cli.MODELS / dataset / f"{model}.json")
    tuned = cli.read_json(cli.TUNING / dataset / f"{model}.json")
    with (
        cli.publish_folder(cli.RUNS / dataset / model) as runs_folder,
        cli.publish_folder(cli.HEADS / dataset / model) as head_folder,
    ):
        if resolved["skipped"]:
            cli.write_text(runs_folder / "runs.csv", cli.NO_RUNS)
            cli.write_json(head_folder / "skipped.json", resolved["skipped"])
        else:
            _train(params, resolved, tuned, runs_folder, head_folder)


def _train(params: config.Params, resolved: dict, tuned: dict, runs_folder: Path, head_folder: Path) -> None:
    """Train the heads of a resolved model and write its runs, predictions and best head."""
    # torch takes 3 s to import; a skipped model needs none of it
    from pipeline.heads import checkpoint
    from pipeline.training import protocol

    dataset, model = resolved["dataset"], resolved["model"]
    data, _ = cli.load_task_data(params, resolved, ("train", "val", "test"))
    row = {"dataset": dataset, "model": model, "weights": cli.weights_of(resolved)}
    result = protocol.train_and_test(data, tuned["best"], params.train.seeds, row)
    cli.write_runs(runs_folder, result)
    checkpoint.save(head_folder / "head.pt", protocol.trained_head(data, model, result.group, result.best_index))
    print(f"{dataset} {model}: test {result.runs.score.mean():.4f}, mean of {len(result.runs)} seeds", flush=True)


if __name__ == "__main__":
    cli.run(train, exactly_one=("model", "selected"))
