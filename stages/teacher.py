"""teacher: choose the model of the grid that students of a dataset learn from."""

import shutil

from cache.atomic import atomic_dir
from pipeline import config
from pipeline.distillation import choose_teacher
from stages.cli import DISTILLATION, HEADS, MODELS, SCRATCH, TUNING, WEIGHTS, read_json, require, run, write_json


def teacher(dataset: str) -> None:
    """Write results/distill/<dataset>/teacher: teacher.json and the teacher's head.pt.

    Students depend on this folder, so they are trained again only if their teacher or its head changes. teacher.json
    also records the weights that students start from.
    """
    params = config.load()
    params.dataset(dataset)
    tuned = {model: read_json(TUNING / dataset / f"{model}.json") for model in params.grid.models}
    name, skipped = choose_teacher(params, dataset, tuned)
    starts = {params.student(student).weights for student in params.grid.students} - {"random"}
    content: dict[str, object] = {"teacher": name, "skipped": skipped}
    with atomic_dir(SCRATCH / f"teacher-{dataset}", DISTILLATION / dataset / "teacher") as folder:
        if name:
            content["model"] = read_json(MODELS / dataset / f"{name}.json")
            sources = {start: read_json(WEIGHTS / start / "source.json") for start in sorted(starts)}
            content["initial_weights"] = sources
            shutil.copy(require(HEADS / dataset / name / "head.pt"), folder)
        write_json(folder / "teacher.json", content)


if __name__ == "__main__":
    run(teacher, "dataset")
