"""cost: measure the size and speed of students and frozen models on real images."""

from pipeline import config
from stages import cli


def cost(dataset: str) -> None:
    """Write results/cost/<dataset>.csv, a row per model and device; empty without students."""
    params = cli.load_params(dataset)
    has_students = params.grid.students and params.distill.applies_to(dataset)
    cli.write_text(cli.COSTS / f"{dataset}.csv", _costs(params, dataset) if has_students else cli.NO_RUNS)


def _costs(params: config.Params, dataset: str) -> str:
    """Measure students, and models of the grid with untrained heads, which cost as much as trained ones.

    So a change of the training measures nothing again. Models with random weights are excluded: they cost as much as
    the same networks with trained weights.
    """
    # torch takes 3 s to import; a dataset without students needs none of it
    import pandas as pd

    from pipeline import cost as costs
    from pipeline.data import image_store
    from pipeline.device import resolve_device
    from pipeline.distillation.student import load_student
    from pipeline.training import protocol, task_data

    def is_skipped(path) -> bool:
        return cli.read_json(path)["skipped"]

    images, tables = image_store.open_images(cli.images_path(dataset)), []
    for device in dict.fromkeys(["cpu", resolve_device(params.compute.device)]):
        models = {}
        for name in params.grid.students:
            folder = cli.DISTILLATION / dataset / name
            if not is_skipped(folder / "metadata.json"):
                models[name] = costs.student_model(load_student(folder / "best")[0], device)
        for model in params.grid.models:
            backbones = {name: params.backbone(name) for name in params.members(model)}
            is_random = any(backbone.weights == "random" for backbone in backbones.values())
            if is_random or is_skipped(cli.MODELS / dataset / f"{model}.json"):
                continue
            stores = {cli.FEATURES / dataset / f"{name}.zarr": None for name in backbones}
            data = task_data.load(stores, cli.images_path(dataset), params.heads, ("val",), device)
            head = protocol.trained_head(data, model, data.head_config.create_group([0]), 0)
            models[model] = costs.frozen_ensemble(head, backbones, cli.WEIGHTS, images, device)
        tables.append(costs.benchmark(models, images.image[: costs.BATCH_CHIPS].values, device))
    return pd.concat(tables, ignore_index=True).assign(dataset=dataset).to_csv(index=False)


if __name__ == "__main__":
    cli.run(cost)
