"""distill: train a student on labels and a teacher's cached outputs, and a supervised baseline."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import pandas as pd

from cache.atomic import atomic_dir
from pipeline import config
from pipeline.backbones import get_spec
from stages.cli import DISTILLATION, IMAGES, SCRATCH, WEIGHTS, feature_stores, read_json, run, write_json


def distill(dataset: str, student: str) -> None:
    """Write results/distill/<dataset>/<student>.

    It has metadata.json, runs.csv, best/ (the student to deploy), and per variant a folder with its runs.csv and
    predictions.parquet.
    """
    params = config.load()
    params.dataset(dataset)
    params.student(student)
    choice = read_json(DISTILLATION / dataset / "teacher/teacher.json")
    teacher, skipped = choice["teacher"], choice["skipped"]
    with atomic_dir(SCRATCH / f"distill-{dataset}-{student}", DISTILLATION / dataset / student) as folder:
        metadata = {"dataset": dataset, "student": student, "teacher": teacher, "skipped": skipped}
        runs = pd.DataFrame(columns=["dataset", "model"])
        if skipped:
            print(f"{dataset} {student}: skipped: {skipped}")
        else:
            details, runs = _train_variants(params, student, choice["model"], folder)
            metadata |= details
        write_json(folder / "metadata.json", metadata)
        runs.to_csv(folder / "runs.csv", index=False)


def _train_variants(params: config.Params, name: str, teacher: dict, folder: Path) -> tuple[dict, pd.DataFrame]:
    """Train all variants of a student. Write best/ and a folder per variant.

    Args:
        name: of the student.
        teacher: the resolved model of the teacher.

    Returns:
        Metadata of the variants, and one row per run.
    """
    # torch takes 3 s to import; a skipped dataset needs none of it
    from pipeline.data.augmentation import AugmentedImages
    from pipeline.data.image_store import UNLABELLED
    from pipeline.device import resolve_device
    from pipeline.distillation import train
    from pipeline.distillation.student import (
        make_spec,
        make_student,
        pretrained_state,
        save_student,
        student_metadata,
    )
    from pipeline.distillation.teacher import CachedTeacher
    from pipeline.distillation.train import DistillationSetup
    from pipeline.heads import checkpoint

    dataset = teacher["dataset"]
    images_path = IMAGES / f"{dataset}.zarr"
    device, student = resolve_device(params.compute.device), params.student(name)
    images = AugmentedImages.load(images_path, params.heads.max_feature_gb)
    head = checkpoint.load(DISTILLATION / dataset / "teacher/head.pt", device)
    cached = CachedTeacher(feature_stores(teacher), images_path, head, images.rows("train", UNLABELLED))
    setup = DistillationSetup(images, cached, params.distill, device)
    spec, initial_state = make_spec(images.images, student), None
    if student.weights != "random":
        backbone = params.backbone(student.weights)
        bands = images.images.band.values.tolist()
        initial_state = pretrained_state(
            student.weights, backbone, get_spec(backbone), WEIGHTS / student.weights, spec, bands
        )
    create_student = partial(make_student, spec, images.mean, images.std, initial_state)
    weights = "random" if initial_state is None else "pretrained"
    cache_key = [asdict(student), teacher, images.images.attrs["content_sha256"], device]
    tables, variants = [], {}
    for variant in params.distill.variants:
        study_path = SCRATCH / "studies" / f"distill-{dataset}-{name}-{variant}.json"
        row = {"dataset": dataset, "model": f"{name} ({variant})", "weights": weights}
        search_result, result = train.train_variant(create_student, setup, variant, row, study_path, cache_key)
        tables.append(result.runs)
        (folder / variant).mkdir()
        result.runs.to_csv(folder / variant / "runs.csv", index=False)
        result.predicted.to_parquet(folder / variant / "predictions.parquet")
        variants[variant] = {**search_result, "seed": result.best_index}
        if variant == "distilled":
            details = student_metadata(images.images, dataset, variant, weights, teacher["model"])
            save_student(folder / "best", result.group[result.best_index], details)
        study_path.unlink(missing_ok=True)
    return {"weights": weights, "variants": variants}, pd.concat(tables, ignore_index=True)


if __name__ == "__main__":
    run(distill, "dataset", "student")
