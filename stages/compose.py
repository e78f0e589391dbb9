"""compose: probe every ensemble of a dataset's backbones, and train the best by the full protocol.

Ensembles are selected on validation. The test split is read once per seed of the selected, as in train.
"""

from dataclasses import asdict, replace
from pathlib import Path

from cache.atomic import atomic_dir
from pipeline import config
from pipeline.composition import CompositionResult
from stages.cli import COMPOSITION, FEATURES, IMAGES, MANIFESTS, SCRATCH, read_json, run, write_json


def compose(dataset: str) -> None:
    """Write results/compose/<dataset>.

    It has composition.json, subsets.csv, cka.csv, greedy.csv and a folder per trained model. Selected models that are
    in the grid are not trained here, because tune and train do that.
    """
    params = config.load()
    params.dataset(dataset)
    manifests = {name: read_json(MANIFESTS / dataset / f"{name}.json") for name in params.composition_backbones()}
    stores = {
        name: (FEATURES / dataset / f"{name}.zarr", manifest["content_sha256"])
        for name, manifest in manifests.items()
        if not manifest["skipped"]
    }
    result = CompositionResult()
    with atomic_dir(SCRATCH / f"compose-{dataset}", COMPOSITION / dataset) as folder:
        if stores:
            # torch takes 3 s to import; a skipped dataset needs none of it
            from pipeline.composition.search import search
            from pipeline.training import task_data

            members, images = task_data.open_aligned(dict(stores.values()), IMAGES / f"{dataset}.zarr")
            result = search(dict(zip(stores, members, strict=True)), images, params.heads, params.composition)
            best = ", ".join(result.selected)
            print(f"{dataset}: {len(result.subsets)} ensembles probed; best: {best}", flush=True)
            for model in result.missing_from(params.grid.models):
                _tune_and_train(dataset, model, stores, manifests, params, folder / model)
        skipped = tuple(manifest["skipped"] for manifest in manifests.values() if manifest["skipped"])
        replace(result, skipped=skipped).write(folder)


def _tune_and_train(
    dataset: str, model: str, stores: dict, manifests: dict, params: config.Params, folder: Path
) -> None:
    """Write a folder with tune.json, runs.csv, predictions.parquet and head.pt."""
    # torch takes 3 s to import; a skipped dataset needs none of it
    from pipeline.device import resolve_device
    from pipeline.heads import checkpoint
    from pipeline.training import protocol, task_data

    members = model.split("+")
    device, images_path = resolve_device(params.compute.device), IMAGES / f"{dataset}.zarr"
    data = task_data.load(
        dict(stores[name] for name in members), images_path, params.heads, ("train", "val", "test"), device
    )
    study_path = SCRATCH / "studies" / f"{dataset}-{model}.json"
    cache_key = [[stores[name][1] for name in members], asdict(params.heads), device]
    tuned = protocol.tune(data, params.search, f"{dataset} {model}", study_path, cache_key)
    weights = "+".join(str(manifests[name]["weights"]["weights"]) for name in members)
    metadata = {"dataset": dataset, "model": model, "weights": weights}
    result = protocol.train_and_test(data, tuned["best"], params.train.seeds, metadata)
    folder.mkdir()
    write_json(folder / "tune.json", tuned)
    result.runs.to_csv(folder / "runs.csv", index=False)
    result.predicted.to_parquet(folder / "predictions.parquet")
    checkpoint.save(folder / "head.pt", protocol.trained_head(data, model, result.group, result.best_index))
    study_path.unlink(missing_ok=True)
    print(f"{dataset} {model}: test {result.runs.score.mean():.4f}, mean of {len(result.runs)} seeds", flush=True)


if __name__ == "__main__":
    run(compose, "dataset")
