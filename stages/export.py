"""export: write a student as ONNX and torch.export files, check them on real images and score them."""

from pathlib import Path

from cache.atomic import atomic_dir
from pipeline import config
from pipeline.data import image_store
from stages.cli import DISTILLATION, EXPORTS, IMAGES, SCRATCH, read_json, run, write_json

# Images of the validation split on which every exported file is scored.
EVAL_IMAGES = 512


def export(student: str, dataset: str | None, int8: bool) -> None:
    """Write student.onnx, student.pt2, student-int8.onnx on request, and export.json with their scores."""
    if dataset:
        config.load().dataset(dataset)  # an unknown name is not a missing result
    folder = DISTILLATION / dataset / student / "best" if dataset else Path(student)
    final = EXPORTS / dataset / student if dataset else folder / "export"
    if dataset and (reason := read_json(folder.parent / "metadata.json")["skipped"]):
        with atomic_dir(SCRATCH / f"export-{dataset}-{student}", final) as scratch:
            write_json(scratch / "export.json", {"skipped": reason})
        print(f"skipped: {reason}")
        return
    # torch takes 3 s to import; a skipped student needs none of it
    from pipeline import export
    from pipeline.distillation.student import load_student

    model, metadata = load_student(folder)
    images = image_store.open_images(IMAGES / f"{metadata['dataset']}.zarr")
    with atomic_dir(SCRATCH / "-".join(["export", *final.resolve().parts[1:]])[-200:], final) as scratch:
        summary = export.write_exports(model, metadata, images, scratch, int8, EVAL_IMAGES)
        rates = export.measure_throughputs(model, scratch, images.image[: export.BATCH].values)
        for name, entry in summary["files"].items():
            entry["images_per_second"] = rates[name]
        write_json(scratch / "export.json", {**summary, "skipped": None})
    for name, entry in summary["files"].items():
        score = f"{summary['metric']} {entry['score']:.4f} on {summary['chips']} validation chips"
        print(f"{name}: {entry['bytes'] / 1e6:.1f} MB, {entry['images_per_second']} images/s, {score}")


if __name__ == "__main__":
    run(
        export, "student", flags={"int8": "also write a file with int8 weights"},
        options={"dataset": "dataset of the student; without it, --student is the folder of a trained student"},
    )  # fmt: skip
