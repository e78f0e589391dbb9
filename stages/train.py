"""train: a model's seeds at its best setting; the only stage that reads the test split, once per seed."""

import pandas as pd

from cache.durable import building
from pipeline import params
from stages.cli import FEATURES, IMAGES, MODELS, RUNS, SCRATCH, TUNED, read_json, run


def train(dataset: str, model: str) -> None:
    """Write runs.csv, one row a seed, and test_counts.parquet, one row a seed and test sample."""
    described = params.load()
    described.members(model)
    resolved, tuned = (
        read_json(MODELS / dataset / f"{model}.json"),
        read_json(TUNED / dataset / f"{model}.json"),
    )
    runs, tested = [], []
    if not resolved["left_out"]:
        from pipeline import cells, metrics
        from pipeline.compute import device
        from pipeline.fit import Setting

        stores = {
            FEATURES / dataset / f"{member['backbone']}.zarr": member["content_sha256"]
            for member in resolved["members"]
        }
        where = device(described.compute.device)
        cell = cells.load(stores, IMAGES / f"{dataset}.zarr", described.heads, ("train", "val", "test"), where)
        settings = [Setting(**tuned["best"], seed=seed) for seed in range(described.train.seeds)]
        group = cell.train(settings)
        counts = {split: cell.counts(group, split) for split in ("val", "test")}
        scores = {
            split: metrics.score(cell.task.kind, values.sum(axis=1), cell.task.classes)
            for split, values in counts.items()
        }
        samples = cell.parts["test"].sample
        for seed in range(described.train.seeds):
            runs.append(
                {"dataset": dataset, "model": model, "protocol": "frozen", "task": cell.task.kind, "seed": seed,
                 "metric": metrics.METRICS[cell.task.kind], "score": scores["test"][seed],
                 "val_score": scores["val"][seed], "n_test": len(samples), "classes": cell.task.classes,
                 "weights": "+".join(str(member["weights"]) for member in resolved["members"]), **tuned["best"]}
            )  # fmt: skip
            tested += [
                {"seed": seed, "sample": name, "counts": row}
                for name, row in zip(samples, counts["test"][seed], strict=True)
            ]
        print(f"{dataset} {model}: test {scores['test'].mean():.4f}, the mean of {len(settings)} seeds")
    with building(SCRATCH / f"runs-{dataset}-{model}", RUNS / dataset / model) as folder:
        pd.DataFrame(runs, columns=None if runs else ["dataset", "model"]).to_csv(folder / "runs.csv", index=False)
        pd.DataFrame(tested, columns=["seed", "sample", "counts"]).to_parquet(folder / "test_counts.parquet")


if __name__ == "__main__":
    run(train, "dataset", "model")
