"""train: a model's seeds at its best setting; the only stage but compose that reads the test split, once per seed."""

import pandas as pd

from cache.atomic import atomic_dir
from pipeline import config
from stages.cli import FEATURES, IMAGES, MODELS, RUNS, SCRATCH, TUNED, read_json, run


def train(dataset: str, model: str) -> None:
    """Write runs.csv, one row a seed; predictions.parquet, one row a seed and test sample; and head.pt, one head."""
    described = config.load()
    described.dataset(dataset)
    described.members(model)
    resolved, tuned = (
        read_json(MODELS / dataset / f"{model}.json"),
        read_json(TUNED / dataset / f"{model}.json"),
    )
    with atomic_dir(SCRATCH / f"runs-{dataset}-{model}", RUNS / dataset / model) as folder:
        if resolved["skipped"]:
            pd.DataFrame(columns=["dataset", "model"]).to_csv(folder / "runs.csv", index=False)
            return
        from pipeline.device import resolve_device
        from pipeline.heads import checkpoint
        from pipeline.training import protocol, task_data

        stores = {
            FEATURES / dataset / f"{member['backbone']}.zarr": member["content_sha256"]
            for member in resolved["members"]
        }
        where = resolve_device(described.compute.device)
        cell = task_data.load(stores, IMAGES / f"{dataset}.zarr", described.heads, ("train", "val", "test"), where)
        weights = "+".join(str(member["weights"]) for member in resolved["members"])
        told = {"dataset": dataset, "model": model, "weights": weights}
        tested = protocol.test(cell, tuned["best"], described.train.seeds, told)
        tested.runs.to_csv(folder / "runs.csv", index=False)
        tested.predicted.to_parquet(folder / "predictions.parquet")
        checkpoint.save(folder / "head.pt", model, cell, tested.group, tested.best)
        print(f"{dataset} {model}: test {tested.runs.score.mean():.4f}, the mean of {len(tested.runs)} seeds")


if __name__ == "__main__":
    run(train, "dataset", "model")
