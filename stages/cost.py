"""cost: every student, its files, and every frozen model beside it, used and timed on real chips of its data set."""

import pandas as pd

from pipeline import config
from stages.cli import COST, DISTILLED, EXPORTED, IMAGES, RATES, RUNS, TUNED, WEIGHTS, read_json, run, write_text


def cost() -> None:
    """Write results/cost.csv, a row a data set, model and device, of the data sets that have students.

    And results/rates.csv, a row a data set, student and exported file.
    """
    described = config.load()
    taught = list(filter(described.distill.applies_to, described.grid.datasets if described.grid.students else ()))
    tables = [_costs(described, dataset) for dataset in taught]
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["dataset", "model"])
    rates = [row for dataset in taught for row in _rates(described, dataset)]
    columns = ["dataset", "student", "file", "images_per_second"]
    write_text(COST, table.to_csv(index=False))
    write_text(RATES, pd.DataFrame(rates, columns=columns).to_csv(index=False))


def _costs(described: config.Params, dataset: str) -> pd.DataFrame:
    from pipeline import cost as costs
    from pipeline.data import image_store
    from pipeline.device import resolve_device

    chips, tables = image_store.open_images(IMAGES / f"{dataset}.zarr").image[: costs.BATCH_CHIPS].values, []
    for where in dict.fromkeys(["cpu", resolve_device(described.compute.device)]):
        tables.append(costs.benchmark(benchmarked_models(described, dataset, where), chips, where))
    return pd.concat(tables, ignore_index=True).assign(dataset=dataset)


def _rates(described: config.Params, dataset: str) -> list[tuple]:
    from pipeline.data import image_store
    from pipeline.distillation import student_files
    from pipeline.export import files, price

    chips, rows = image_store.open_images(IMAGES / f"{dataset}.zarr").image[: price.BATCH].values, []
    for name in described.grid.students:
        if not read_json(EXPORTED / dataset / name / "export.json")["skipped"]:
            one, _ = student_files.load_student(DISTILLED / dataset / name / "best")
            found = files.measure_throughputs(one, EXPORTED / dataset / name, chips)
            rows += [(dataset, name, file, rate) for file, rate in found.items()]
    return rows


def benchmarked_models(described: config.Params, dataset: str, where: str) -> dict:
    """The students and models of the grid, by name, on a device; random controls cost what their likes do."""
    from pipeline import cost as costs
    from pipeline.data import image_store
    from pipeline.distillation import student_files
    from pipeline.heads import checkpoint

    store, models = image_store.open_images(IMAGES / f"{dataset}.zarr"), {}
    for name in described.grid.students:
        if not read_json(DISTILLED / dataset / name / "metadata.json")["skipped"]:
            one, _ = student_files.load_student(DISTILLED / dataset / name / "best")
            models[name] = costs.student(one, where)
    for model in described.grid.models:
        backbones = {name: described.backbone(name) for name in described.members(model)}
        random = any(one.weights == "random" for one in backbones.values())
        if not random and not read_json(TUNED / dataset / f"{model}.json")["skipped"]:
            head = checkpoint.load(RUNS / dataset / model / "head.pt", where)
            models[model] = costs.frozen_ensemble(head, backbones, WEIGHTS, store, where)
    return models


if __name__ == "__main__":
    run(cost)
