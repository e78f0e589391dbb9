"""compose: probe every ensemble of a dataset's backbones on validation, and select the best."""

from dataclasses import replace

from pipeline.composition import CompositionResult
from stages import cli


def compose(dataset: str) -> None:
    """Write results/compose/<dataset>: composition.json, subsets.csv, cka.csv and greedy.csv."""
    params = cli.load_params(dataset)
    names = params.composition_backbones()
    manifests = [cli.read_json(cli.MANIFESTS / dataset / f"{name}.json") for name in names]
    members = [manifest for manifest in manifests if not manifest["skipped"]]
    result = CompositionResult()
    if members:
        # torch takes 3 s to import; a skipped dataset needs none of it
        from pipeline.composition.search import search
        from pipeline.training import task_data

        stores = cli.feature_stores({"dataset": dataset, "members": members})
        features, images = task_data.open_aligned(stores, cli.images_path(dataset))
        by_name = dict(zip((member["backbone"] for member in members), features, strict=True))
        result = search(by_name, images, params.heads, params.composition)
        print(f"{dataset}: {len(result.subsets)} ensembles probed; best: {', '.join(result.selected)}", flush=True)
    skipped = tuple(manifest["skipped"] for manifest in manifests if manifest["skipped"])
    with cli.publish_folder(cli.COMPOSITION / dataset) as folder:
        replace(result, skipped=skipped).write(folder)


if __name__ == "__main__":
    cli.run(compose)
