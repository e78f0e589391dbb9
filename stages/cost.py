"""cost: benchmark students, their exported files and frozen models on real images."""

import pandas as pd

from pipeline import config
from stages.cli import COST, DISTILLATION, EXPORTS, IMAGES, RATES, RUNS, TUNING, WEIGHTS, read_json, run, write_text


def cost() -> None:
    """Write results/cost.csv and results/rates.csv, for the datasets that have students.

    cost.csv has one row per dataset, model and device; rates.csv one per dataset, student and exported file.
    """
    params = config.load()
    datasets = list(filter(params.distill.applies_to, params.grid.datasets if params.grid.students else ()))
    tables = [_costs(params, dataset) for dataset in datasets]
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["dataset", "model"])
    rates = [row for dataset in datasets for row in _rates(params, dataset)]
    columns = ["dataset", "student", "file", "images_per_second"]
    write_text(COST, table.to_csv(index=False))
    write_text(RATES, pd.DataFrame(rates, columns=columns).to_csv(index=False))


def _costs(params: config.Params, dataset: str) -> pd.DataFrame:
    # torch takes 3 s to import; a grid without students needs none of it
    from pipeline import cost as costs
    from pipeline.data import image_store
    from pipeline.device import resolve_device

    images = image_store.open_images(IMAGES / f"{dataset}.zarr").image[: costs.BATCH_CHIPS].values
    tables = []
    for device in dict.fromkeys(["cpu", resolve_device(params.compute.device)]):
        tables.append(costs.benchmark(benchmarked_models(params, dataset, device), images, device))
    return pd.concat(tables, ignore_index=True).assign(dataset=dataset)


def _rates(params: config.Params, dataset: str) -> list[tuple]:
    # torch takes 3 s to import; a grid without students needs none of it
    from pipeline import export
    from pipeline.data import image_store
    from pipeline.distillation.student import load_student

    images, rows = image_store.open_images(IMAGES / f"{dataset}.zarr").image[: export.BATCH].values, []
    for name in params.grid.students:
        if not read_json(EXPORTS / dataset / name / "export.json")["skipped"]:
            student, _ = load_student(DISTILLATION / dataset / name / "best")
            throughputs = export.measure_throughputs(student, EXPORTS / dataset / name, images)
            rows += [(dataset, name, file, rate) for file, rate in throughputs.items()]
    return rows


def benchmarked_models(params: config.Params, dataset: str, device: str) -> dict:
    """Load the students and models of the grid on a device, by name.

    Models with random weights are excluded: they cost as much as the same networks with trained weights.
    """
    # torch takes 3 s to import; a grid without students needs none of it
    from pipeline import cost as costs
    from pipeline.data import image_store
    from pipeline.distillation.student import load_student
    from pipeline.heads import checkpoint

    images, models = image_store.open_images(IMAGES / f"{dataset}.zarr"), {}
    for name in params.grid.students:
        if not read_json(DISTILLATION / dataset / name / "metadata.json")["skipped"]:
            student, _ = load_student(DISTILLATION / dataset / name / "best")
            models[name] = costs.student_model(student, device)
    for model in params.grid.models:
        backbones = {name: params.backbone(name) for name in params.members(model)}
        random = any(backbone.weights == "random" for backbone in backbones.values())
        if not random and not read_json(TUNING / dataset / f"{model}.json")["skipped"]:
            head = checkpoint.load(RUNS / dataset / model / "head.pt", device)
            models[model] = costs.frozen_ensemble(head, backbones, WEIGHTS, images, device)
    return models


if __name__ == "__main__":
    run(cost)
