"""train: train a model's heads with the best hyperparameters and score them on the test split.

Only this stage, compose, finetune and distill read the test split, once per seed.
"""

import pandas as pd

from cache.atomic import atomic_dir
from pipeline import config
from stages.cli import FEATURES, IMAGES, MODELS, RUNS, SCRATCH, TUNING, read_json, run


def train(dataset: str, model: str) -> None:
    """Write results/runs/<dataset>/<model>.

    runs.csv has one row per seed, predictions.parquet one row per seed and test sample, head.pt the best head on
    validation.
    """
    params = config.load()
    params.dataset(dataset)
    params.members(model)
    resolved = read_json(MODELS / dataset / f"{model}.json")
    tuned = read_json(TUNING / dataset / f"{model}.json")
    with atomic_dir(SCRATCH / f"runs-{dataset}-{model}", RUNS / dataset / model) as folder:
        if resolved["skipped"]:
            pd.DataFrame(columns=["dataset", "model"]).to_csv(folder / "runs.csv", index=False)
            return
        # torch takes 3 s to import; a skipped model needs none of it
        from pipeline.device import resolve_device
        from pipeline.heads import checkpoint
        from pipeline.training import protocol, task_data

        stores = {
            FEATURES / dataset / f"{member['backbone']}.zarr": member["content_sha256"]
            for member in resolved["members"]
        }
        device = resolve_device(params.compute.device)
        data = task_data.load(stores, IMAGES / f"{dataset}.zarr", params.heads, ("train", "val", "test"), device)
        weights = "+".join(str(member["weights"]) for member in resolved["members"])
        row = {"dataset": dataset, "model": model, "weights": weights}
        result = protocol.train_and_test(data, tuned["best"], params.train.seeds, row)
        result.runs.to_csv(folder / "runs.csv", index=False)
        result.predicted.to_parquet(folder / "predictions.parquet")
        checkpoint.save(folder / "head.pt", protocol.trained_head(data, model, result.group, result.best_index))
        print(f"{dataset} {model}: test {result.runs.score.mean():.4f}, mean of {len(result.runs)} seeds")


if __name__ == "__main__":
    run(train, "dataset", "model")
