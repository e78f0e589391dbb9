"""distill: a compact student learns from a model's cached features and head, and its twin from labels alone."""

from dataclasses import asdict
from functools import partial

import pandas as pd

from cache.atomic import atomic_dir
from pipeline import config
from pipeline.backbones import get_spec
from stages.cli import DISTILLED, FEATURES, IMAGES, MODELS, RUNS, SCRATCH, TUNED, WEIGHTS, read_json, run, write_json


def distill(dataset: str, student: str) -> None:
    """Write results/distill/<dataset>/<student>: metadata.json, runs.csv; best/, the student to deploy.

    A folder a variant has its own runs.csv, and predictions.parquet.
    """
    described = config.load()
    described.dataset(dataset)
    described.student(student)
    from pipeline.distillation.choose import choose_teacher as choose

    tuned = {model: read_json(TUNED / dataset / f"{model}.json") for model in described.grid.models}
    teacher, skipped = choose(described, dataset, tuned)
    with atomic_dir(SCRATCH / f"distill-{dataset}-{student}", DISTILLED / dataset / student) as folder:
        told = {"dataset": dataset, "student": student, "teacher": teacher, "skipped": skipped}
        runs = pd.DataFrame(columns=["dataset", "model"])
        if skipped:
            print(f"{dataset} {student}: left out: {skipped}")
        else:
            more, runs = _taught(described, dataset, student, teacher, folder)
            told |= more
        write_json(folder / "metadata.json", told)
        runs.to_csv(folder / "runs.csv", index=False)


def _taught(described: config.Params, dataset: str, name: str, teacher: str, folder):
    """All variants: what metadata.json says of them, and their runs. Writes best/ and the variants' folders."""
    from pipeline.device import resolve_device
    from pipeline.distillation import protocol, start, student_files
    from pipeline.distillation.chips import Chips
    from pipeline.distillation.describe import make_spec, student_metadata
    from pipeline.distillation.teacher import CachedTeacher
    from pipeline.distillation.train import DistillationSetup
    from pipeline.heads import checkpoint

    resolved, pictures = read_json(MODELS / dataset / f"{teacher}.json"), IMAGES / f"{dataset}.zarr"
    where, chosen = resolve_device(described.compute.device), described.student(name)
    chips = Chips(pictures, described.heads.max_feature_gb)
    stores = {FEATURES / dataset / f"{one['backbone']}.zarr": one["content_sha256"] for one in resolved["members"]}
    head = checkpoint.load(RUNS / dataset / teacher / "head.pt", where)
    lesson = DistillationSetup(chips, CachedTeacher(stores, pictures, head, chips.taught()), described.distill, where)
    shape, begun = make_spec(chips.store, chosen), None
    if chosen.weights != "random":
        backbone = described.backbone(chosen.weights)
        bands = chips.store.band.values.tolist()
        begun = start.pretrained_state(chosen.weights, backbone, get_spec(backbone), WEIGHTS / chosen.weights, shape, bands)
    fresh = partial(start.make_student, shape, chips.mean, chips.std, begun)
    weights = "random" if begun is None else "pretrained"
    key = [asdict(chosen), resolved, chips.store.attrs["content_sha256"], where]
    tables, variants = [], {}
    for variant in described.distill.variants:
        study = SCRATCH / "studies" / f"distill-{dataset}-{name}-{variant}.json"
        row = {"dataset": dataset, "model": f"{name} ({variant})", "weights": weights}
        taught = protocol.train_variant(fresh, lesson, variant, row, study, key)
        tables.append(taught.runs)
        (folder / variant).mkdir()
        taught.runs.to_csv(folder / variant / "runs.csv", index=False)
        taught.predicted.to_parquet(folder / variant / "predictions.parquet")
        variants[variant] = {**taught.tuned, "seed": taught.seed}
        if variant == "distilled":
            more = student_metadata(chips.store, dataset, variant, weights, teacher)
            student_files.save_student(folder / "best", taught.best, more)
        study.unlink(missing_ok=True)
    return {"weights": weights, "variants": variants}, pd.concat(tables, ignore_index=True)


if __name__ == "__main__":
    run(distill, "dataset", "student")
