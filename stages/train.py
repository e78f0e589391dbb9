"""train: a model's seeds at its best setting; the only stage but compose that reads the test split, once per seed."""

import pandas as pd

from cache.durable import building
from pipeline import params
from stages.cli import FEATURES, IMAGES, MODELS, RUNS, SCRATCH, TUNED, read_json, run


def train(dataset: str, model: str) -> None:
    """Write runs.csv, one row a seed, and predictions.parquet, one row a seed and test sample."""
    described = params.load()
    described.members(model)
    resolved, tuned = (
        read_json(MODELS / dataset / f"{model}.json"),
        read_json(TUNED / dataset / f"{model}.json"),
    )
    runs, predicted = pd.DataFrame(columns=["dataset", "model"]), pd.DataFrame(columns=["seed", "sample"])
    if not resolved["left_out"]:
        from pipeline import cells, protocol
        from pipeline.compute import device

        stores = {
            FEATURES / dataset / f"{member['backbone']}.zarr": member["content_sha256"]
            for member in resolved["members"]
        }
        where = device(described.compute.device)
        cell = cells.load(stores, IMAGES / f"{dataset}.zarr", described.heads, ("train", "val", "test"), where)
        weights = "+".join(str(member["weights"]) for member in resolved["members"])
        told = {"dataset": dataset, "model": model, "weights": weights}
        runs, predicted = protocol.test(cell, tuned["best"], described.train.seeds, told)
        print(f"{dataset} {model}: test {runs.score.mean():.4f}, the mean of {len(runs)} seeds")
    with building(SCRATCH / f"runs-{dataset}-{model}", RUNS / dataset / model) as folder:
        runs.to_csv(folder / "runs.csv", index=False)
        predicted.to_parquet(folder / "predictions.parquet")


if __name__ == "__main__":
    run(train, "dataset", "model")
