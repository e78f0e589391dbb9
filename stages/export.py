"""export: write a student as ONNX and torch.export files, check them on real images and score them."""

from pathlib import Path

from stages import cli

# Images of the validation split on which every exported file is scored.
EVAL_IMAGES = 512


def export(student: str, dataset: str | None, int8: bool) -> None:
    """Write student.onnx, student.pt2, student-int8.onnx on request, and export.json with their scores.

    The student is one of --dataset, or, without it, --student is the folder of a trained student.
    """
    folder, final = Path(student), Path(student) / "export"
    if dataset:
        cli.load_params(dataset).student(student)  # an unknown name is not a missing result
        folder, final = cli.DISTILLATION / dataset / student / "best", cli.EXPORTS / dataset / student
        if reason := cli.read_json(folder.parent / "metadata.json")["skipped"]:
            cli.publish_skipped(final, "export.json", reason)
            return
    # torch takes 3 s to import; a skipped student needs none of it
    from pipeline import export
    from pipeline.data import image_store
    from pipeline.distillation.student import load_student

    model, metadata = load_student(folder)
    images = image_store.open_images(cli.images_path(metadata["dataset"]))
    with cli.publish_folder(final) as scratch:
        summary = export.write_exports(model, metadata, images, scratch, int8, EVAL_IMAGES)
        rates = export.measure_throughputs(model, scratch, images.image[: export.BATCH].values)
        for name, entry in summary["files"].items():
            entry["images_per_second"] = rates[name]
        cli.write_json(scratch / "export.json", {**summary, "skipped": None})
    for name, entry in summary["files"].items():
        score = f"{summary['metric']} {entry['score']:.4f} on {summary['chips']} validation chips"
        print(f"{name}: {entry['bytes'] / 1e6:.1f} MB, {entry['images_per_second']} images/s, {score}")


if __name__ == "__main__":
    cli.run(export)
