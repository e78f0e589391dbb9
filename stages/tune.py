"""tune: the search for a model's learning rate and weight decay, on train and validation alone."""

from dataclasses import asdict

from pipeline import params
from stages.cli import FEATURES, IMAGES, MODELS, SCRATCH, TUNED, read_json, run, write_json


def tune(dataset: str, model: str) -> None:
    """Write results/tune/<dataset>/<model>.json."""
    described = params.load()
    described.members(model)
    resolved = read_json(MODELS / dataset / f"{model}.json")
    study = SCRATCH / "studies" / f"{dataset}-{model}.json"
    result = {"dataset": dataset, "model": model, "left_out": resolved["left_out"]}
    if not resolved["left_out"]:
        from pipeline import cells, metrics
        from pipeline.compute import device
        from pipeline.search import search

        stores = {
            FEATURES / dataset / f"{member['backbone']}.zarr": member["content_sha256"]
            for member in resolved["members"]
        }
        where = device(described.compute.device)
        cell = cells.load(stores, IMAGES / f"{dataset}.zarr", described.heads, ("train", "val"), where)

        def score(settings):
            counts = cell.counts(cell.train(settings), "val")
            scores = metrics.score(cell.task.kind, counts.sum(axis=1), cell.task.classes)
            print(
                f"{dataset} {model}: {len(settings)} trials, best on validation {scores.max():.4f}",
                flush=True,
            )
            return scores

        result |= search(score, described.search, study, [resolved, asdict(described.heads), where])
    write_json(TUNED / dataset / f"{model}.json", result)
    study.unlink(missing_ok=True)


if __name__ == "__main__":
    run(tune, "dataset", "model")
