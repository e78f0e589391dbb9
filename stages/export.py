"""export: a student as ONNX and torch.export, checked on real chips; its int8 form, and what that costs."""

from pathlib import Path

from cache.atomic import atomic_dir
from pipeline import config
from pipeline.data import image_store
from stages.cli import DISTILLED, EXPORTED, IMAGES, SCRATCH, read_json, run, write_json

# Chips of the validation split that files are scored on; each way of running them sees the same.
CHIPS = 512


def export(student: str, dataset: str | None, int8: bool) -> None:
    """Write student.onnx, student.pt2, on request student-int8.onnx, and export.json, what each is worth.

    How fast they are is measured by `cost` when nothing else runs, or here if the student is not of the grid.
    """
    if dataset:
        config.load().dataset(dataset)  # or what it lacks would seem to be a run of an earlier stage
    folder = DISTILLED / dataset / student / "best" if dataset else Path(student)
    final = EXPORTED / dataset / student if dataset else folder / "export"
    if dataset and (reason := read_json(folder.parent / "metadata.json")["skipped"]):
        with atomic_dir(SCRATCH / f"export-{dataset}-{student}", final) as scratch:
            write_json(scratch / "export.json", {"skipped": reason})
        print(f"left out: {reason}")
        return
    from pipeline.distillation import student_files

    made, told = student_files.load_student(folder)
    pictures = image_store.open_images(IMAGES / f"{told['dataset']}.zarr")
    from pipeline.export import files, price

    with atomic_dir(SCRATCH / "-".join(["export", *final.resolve().parts[1:]])[-200:], final) as scratch:
        said = files.write_exports(made, told, pictures, scratch, int8, CHIPS)
        said["skipped"] = None
        write_json(scratch / "export.json", said)
    rates = {} if dataset else files.measure_throughputs(made, final, pictures.image[: price.BATCH].values)
    for name, one in said["files"].items():
        worth = f"{said['metric']} {one['score']:.4f} on {said['chips']} validation chips"
        rate = f", {rates[name]} images/s" if name in rates else ""
        print(f"{name}: {one['bytes'] / 1e6:.1f} MB{rate}, {worth}")


if __name__ == "__main__":
    run(
        export, "student", flags={"int8": "also write it with int8 weights"},
        options={"dataset": "that the student is of; without it --student is its folder"},
    )  # fmt: skip
