"""compose: every ensemble of a data set's backbones by a quick probe, and the full protocol on the best few.

Validation alone chooses; the test split is read once per seed of those chosen, as in train.
"""

from dataclasses import asdict

from cache.atomic import atomic_dir
from pipeline import config
from stages.cli import COMPOSED, FEATURES, IMAGES, MANIFESTS, SCRATCH, read_json, run, write_json


def compose(dataset: str) -> None:
    """Write results/compose/<dataset>: compose.json, subsets.csv, cka.csv, greedy.csv, and a folder a model run.

    A model that the grid has is chosen like any other, but run by tune and train alone.
    """
    described = config.load()
    described.dataset(dataset)
    manifests = {name: read_json(MANIFESTS / dataset / f"{name}.json") for name in described.composition_backbones()}
    stores = {
        name: (FEATURES / dataset / f"{name}.zarr", manifest["content_sha256"])
        for name, manifest in manifests.items()
        if not manifest["skipped"]
    }
    told = {
        "dataset": dataset,
        "backbones": list(stores),
        "skipped": [manifest["skipped"] for manifest in manifests.values() if manifest["skipped"]],
        "chosen": [],
        "run": [],
    }
    with atomic_dir(SCRATCH / f"compose-{dataset}", COMPOSED / dataset) as folder:
        if stores:
            from pipeline.composition import search
            from pipeline.training import task_data

            members, labelled = task_data.open_aligned(dict(stores.values()), IMAGES / f"{dataset}.zarr")
            found = search.search(
                dict(zip(stores, members, strict=True)), labelled, described.heads, described.composition
            )
            chosen = search.top_k(found.subsets, described.composition.top_k)
            new = [model for model in chosen if not _of_grid(model, described)]
            told |= {"probe": found.probe, "chosen": chosen, "run": new}
            for name in ("subsets", "cka", "greedy"):
                getattr(found, name).to_csv(folder / f"{name}.csv", index=False)
            print(f"{dataset}: {len(found.subsets)} ensembles probed; best: {', '.join(chosen)}", flush=True)
            for model in new:
                _run(dataset, model, stores, manifests, described, folder / model)
        write_json(folder / "compose.json", told)


def _of_grid(model: str, described: config.Params) -> bool:
    """Whether the grid has it, with its members in whatever order."""
    return any(set(model.split("+")) == set(one.split("+")) for one in described.grid.models)


def _run(dataset: str, model: str, stores: dict, manifests: dict, described: config.Params, folder) -> None:
    """The full protocol on one model: tune.json, runs.csv, predictions.parquet, head.pt."""
    from pipeline.device import resolve_device
    from pipeline.heads import checkpoint
    from pipeline.training import protocol, task_data

    members = model.split("+")
    where, pictures = resolve_device(described.compute.device), IMAGES / f"{dataset}.zarr"
    cell = task_data.load(
        dict(stores[name] for name in members), pictures, described.heads, ("train", "val", "test"), where
    )
    study = SCRATCH / "studies" / f"{dataset}-{model}.json"
    about = [[stores[name][1] for name in members], asdict(described.heads), where]
    tuned = protocol.tune(cell, described.search, f"{dataset} {model}", study, about)
    weights = "+".join(str(manifests[name]["weights"]["weights"]) for name in members)
    told = {"dataset": dataset, "model": model, "weights": weights}
    tested = protocol.test(cell, tuned["best"], described.train.seeds, told)
    folder.mkdir()
    write_json(folder / "tune.json", tuned)
    tested.runs.to_csv(folder / "runs.csv", index=False)
    tested.predicted.to_parquet(folder / "predictions.parquet")
    checkpoint.save(folder / "head.pt", model, cell, tested.group, tested.best)
    study.unlink(missing_ok=True)
    print(f"{dataset} {model}: test {tested.runs.score.mean():.4f}, the mean of {len(tested.runs)} seeds", flush=True)


if __name__ == "__main__":
    run(compose, "dataset")
