"""distill: train a student on labels and a teacher's cached outputs, and a supervised baseline."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from pipeline import config
from stages import cli


def distill(dataset: str, student: str) -> None:
    """Write results/distill/<dataset>/<student>.

    It has metadata.json, runs.csv, best/ (the student to deploy), and per variant a folder with its runs.csv and
    predictions.parquet.
    """
    params = cli.load_params(dataset)
    params.student(student)
    choice = cli.read_json(cli.DISTILLATION / dataset / "teacher/teacher.json")
    metadata = {"dataset": dataset, "student": student, "teacher": choice["teacher"], "skipped": choice["skipped"]}
    with cli.publish_folder(cli.DISTILLATION / dataset / student) as folder:
        if choice["skipped"]:
            print(f"{dataset} {student}: skipped: {choice['skipped']}")
            cli.write_text(folder / "runs.csv", cli.NO_RUNS)
        else:
            metadata |= _train_variants(params, student, choice["model"], folder)
        cli.write_json(folder / "metadata.json", metadata)


def _train_variants(params: config.Params, name: str, teacher: dict, folder: Path) -> dict:
    """Train all variants of a student by a resolved teacher; write results and return metadata."""
    # torch takes 3 s to import; a skipped dataset needs none of it
    import pandas as pd

    from pipeline.data.augmentation import AugmentedImages
    from pipeline.data.image_store import UNLABELLED
    from pipeline.device import resolve_device
    from pipeline.distillation import student as students
    from pipeline.distillation import train
    from pipeline.distillation.teacher import CachedTeacher
    from pipeline.heads import checkpoint

    dataset, config_block = teacher["dataset"], params.student(name)
    device, images_path = resolve_device(params.compute.device), cli.images_path(dataset)
    images = AugmentedImages.load(images_path, params.heads.max_feature_gb)
    head = checkpoint.load(cli.DISTILLATION / dataset / "teacher/head.pt", device)
    cached = CachedTeacher(cli.feature_stores(teacher), images_path, head, images.rows("train", UNLABELLED))
    setup = train.DistillationSetup(images, cached, params.distill, device)
    spec, initial_state, weights = students.make_spec(images.images, config_block), None, "random"
    if (start := config_block.weights) != "random":
        backbone, bands = params.backbone(start), images.images.band.values.tolist()
        weights_dir, weights = cli.WEIGHTS / start, "pretrained"
        initial_state = students.pretrained_state(start, backbone, weights_dir, spec, bands)
    create_student = partial(students.make_student, spec, images.mean, images.std, initial_state)
    cache_key = [asdict(config_block), teacher, images.images.attrs["content_sha256"], device]
    tables, variants = [], {}
    for variant in params.distill.variants:
        study_path = cli.SCRATCH / "studies" / f"distill-{dataset}-{name}-{variant}.json"
        row = {"dataset": dataset, "model": f"{name} ({variant})", "weights": weights}
        search_result, result = train.train_variant(create_student, setup, variant, row, study_path, cache_key)
        tables.append(result.runs)
        (folder / variant).mkdir()
        cli.write_runs(folder / variant, result)
        variants[variant] = {**search_result, "seed": result.best_index}
        if variant == "distilled":
            details = students.student_metadata(images.images, dataset, variant, weights, teacher["model"])
            students.save_student(folder / "best", result.group[result.best_index], details)
        study_path.unlink(missing_ok=True)
    pd.concat(tables, ignore_index=True).to_csv(folder / "runs.csv", index=False)
    return {"weights": weights, "variants": variants}


if __name__ == "__main__":
    cli.run(distill)
