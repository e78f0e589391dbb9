"""compose: probe every ensemble of a dataset's backbones on validation, and select the best."""

from dataclasses import replace

from cache.atomic import atomic_dir
from pipeline import config
from pipeline.composition import CompositionResult
from stages.cli import COMPOSITION, FEATURES, IMAGES, MANIFESTS, SCRATCH, read_json, run


def compose(dataset: str) -> None:
    """Write results/compose/<dataset>: composition.json, subsets.csv, cka.csv and greedy.csv."""
    params = config.load()
    params.dataset(dataset)
    manifests = {name: read_json(MANIFESTS / dataset / f"{name}.json") for name in params.composition_backbones()}
    stores = {
        FEATURES / dataset / f"{name}.zarr": manifest["content_sha256"]
        for name, manifest in manifests.items()
        if not manifest["skipped"]
    }
    result = CompositionResult()
    with atomic_dir(SCRATCH / f"compose-{dataset}", COMPOSITION / dataset) as folder:
        if stores:
            # torch takes 3 s to import; a skipped dataset needs none of it
            from pipeline.composition.search import search
            from pipeline.training import task_data

            members, images = task_data.open_aligned(stores, IMAGES / f"{dataset}.zarr")
            names = [path.stem for path in stores]
            result = search(dict(zip(names, members, strict=True)), images, params.heads, params.composition)
            print(
                f"{dataset}: {len(result.subsets)} ensembles probed; best: {', '.join(result.selected)}", flush=True
            )
        skipped = tuple(manifest["skipped"] for manifest in manifests.values() if manifest["skipped"])
        replace(result, skipped=skipped).write(folder)


if __name__ == "__main__":
    run(compose, "dataset")
