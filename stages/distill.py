"""distill: a compact student learns from a model's cached features and head, and its twin from labels alone."""

from dataclasses import asdict
from functools import partial

import pandas as pd

from cache.durable import building
from pipeline import params
from pipeline.backbones import spec
from stages.cli import DISTILLED, FEATURES, IMAGES, MODELS, RUNS, SCRATCH, TUNED, WEIGHTS, read_json, run, write_json


def distill(dataset: str, student: str) -> None:
    """Write results/distill/<dataset>/<student>: told.json, runs.csv; best/, the student to deploy.

    A folder a variant has its own runs.csv, and predictions.parquet.
    """
    described = params.load()
    described.dataset(dataset)
    described.student(student)
    from pipeline.distill.choose import teacher as choose

    tuned = {model: read_json(TUNED / dataset / f"{model}.json") for model in described.grid.models}
    teacher, left_out = choose(described, dataset, tuned)
    with building(SCRATCH / f"distill-{dataset}-{student}", DISTILLED / dataset / student) as folder:
        told = {"dataset": dataset, "student": student, "teacher": teacher, "left_out": left_out}
        runs = pd.DataFrame(columns=["dataset", "model"])
        if left_out:
            print(f"{dataset} {student}: left out: {left_out}")
        else:
            more, runs = _taught(described, dataset, student, teacher, folder)
            told |= more
        write_json(folder / "told.json", told)
        runs.to_csv(folder / "runs.csv", index=False)


def _taught(described: params.Params, dataset: str, name: str, teacher: str, folder):
    """All variants: what told.json says of them, and their runs. Writes best/ and the variants' folders."""
    from pipeline import students
    from pipeline.compute import device
    from pipeline.distill import protocol, start
    from pipeline.distill.chips import Chips
    from pipeline.distill.describe import about, shape_of
    from pipeline.distill.teacher import Teacher
    from pipeline.distill.train import Lesson
    from pipeline.training import kept

    resolved, pictures = read_json(MODELS / dataset / f"{teacher}.json"), IMAGES / f"{dataset}.zarr"
    where, chosen = device(described.compute.device), described.student(name)
    chips = Chips(pictures, described.heads.memory)
    stores = {FEATURES / dataset / f"{one['backbone']}.zarr": one["content_sha256"] for one in resolved["members"]}
    head = kept.load(RUNS / dataset / teacher / "head.pt", where)
    lesson = Lesson(chips, Teacher(stores, pictures, head, chips.taught()), described.distill, where)
    shape, begun = shape_of(chips.store, chosen), None
    if chosen.weights != "random":
        backbone = described.backbone(chosen.weights)
        bands = chips.store.band.values.tolist()
        begun = start.trained(chosen.weights, backbone, spec(backbone), WEIGHTS / chosen.weights, shape, bands)
    fresh = partial(start.make, shape, chips.mean, chips.std, begun)
    weights = "random" if begun is None else "pretrained"
    key = [asdict(chosen), resolved, chips.store.attrs["content_sha256"], where]
    tables, variants = [], {}
    for variant in described.distill.variants:
        study = SCRATCH / "studies" / f"distill-{dataset}-{name}-{variant}.json"
        row = {"dataset": dataset, "model": f"{name}/{variant}", "weights": weights}
        taught = protocol.teach(fresh, lesson, variant, row, study, key)
        tables.append(taught.runs)
        (folder / variant).mkdir()
        taught.runs.to_csv(folder / variant / "runs.csv", index=False)
        taught.predicted.to_parquet(folder / variant / "predictions.parquet")
        variants[variant] = {**taught.tuned, "seed": taught.seed}
        if variant == "distilled":
            more = about(chips.store, dataset, variant, weights, teacher)
            students.save(folder / "best", taught.best, more)
        study.unlink(missing_ok=True)
    return {"weights": weights, "variants": variants}, pd.concat(tables, ignore_index=True)


if __name__ == "__main__":
    run(distill, "dataset", "student")
