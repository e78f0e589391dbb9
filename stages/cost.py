"""cost: measure the size and speed of students and frozen models on real images."""

import pandas as pd
import xarray as xr

from pipeline import config
from stages.cli import COSTS, DISTILLATION, FEATURES, IMAGES, MODELS, WEIGHTS, read_json, run, write_text


def cost(dataset: str) -> None:
    """Write results/cost/<dataset>.csv, a row per model and device; empty without students."""
    params = config.load()
    params.dataset(dataset)
    has_students = params.grid.students and params.distill.applies_to(dataset)
    table = _costs(params, dataset) if has_students else pd.DataFrame(columns=["dataset", "model"])
    write_text(COSTS / f"{dataset}.csv", table.to_csv(index=False))


def _costs(params: config.Params, dataset: str) -> pd.DataFrame:
    # torch takes 3 s to import; a grid without students needs none of it
    from pipeline import cost as costs
    from pipeline.data import image_store
    from pipeline.device import resolve_device

    images, tables = image_store.open_images(IMAGES / f"{dataset}.zarr"), []
    for device in dict.fromkeys(["cpu", resolve_device(params.compute.device)]):
        models = _load_students(params, dataset, device) | _load_models(params, images, dataset, device)
        tables.append(costs.benchmark(models, images.image[: costs.BATCH_CHIPS].values, device))
    return pd.concat(tables, ignore_index=True).assign(dataset=dataset)


def _load_students(params: config.Params, dataset: str, device: str) -> dict:
    # torch takes 3 s to import; a dataset without students needs none of it
    from pipeline import cost as costs
    from pipeline.distillation.student import load_student

    return {
        name: costs.student_model(load_student(DISTILLATION / dataset / name / "best")[0], device)
        for name in params.grid.students
        if not read_json(DISTILLATION / dataset / name / "metadata.json")["skipped"]
    }


def _load_models(params: config.Params, images: xr.Dataset, dataset: str, device: str) -> dict:
    """Load the models of the grid with untrained heads, which cost as much as trained ones.

    So a change of the training measures nothing again. Models with random weights are excluded: they cost as much as
    the same networks with trained weights.
    """
    # torch takes 3 s to import; a dataset without students needs none of it
    from pipeline import cost as costs
    from pipeline.training import protocol, task_data

    models = {}
    for model in params.grid.models:
        backbones = {name: params.backbone(name) for name in params.members(model)}
        skipped = read_json(MODELS / dataset / f"{model}.json")["skipped"]
        if not skipped and all(backbone.weights != "random" for backbone in backbones.values()):
            stores = {FEATURES / dataset / f"{name}.zarr": None for name in backbones}
            data = task_data.load(stores, IMAGES / f"{dataset}.zarr", params.heads, ("val",), device)
            head = protocol.trained_head(data, model, data.head_config.create_group([0]), 0)
            models[model] = costs.frozen_ensemble(head, backbones, WEIGHTS, images, device)
    return models


if __name__ == "__main__":
    run(cost, "dataset")
