"""teacher: choose the model of the grid that students of a dataset learn from."""

import shutil

from pipeline.distillation import choose_teacher
from stages import cli


def teacher(dataset: str) -> None:
    """Write results/distill/<dataset>/teacher: teacher.json and the teacher's head.pt.

    Students depend on this folder, so they are trained again only if their teacher or its head changes. teacher.json
    also records the weights that students start from.
    """
    params = cli.load_params(dataset)
    tuned = {model: cli.read_json(cli.TUNING / dataset / f"{model}.json") for model in params.grid.models}
    name, skipped = choose_teacher(params, dataset, tuned)
    content: dict[str, object] = {"teacher": name, "skipped": skipped}
    with cli.publish_folder(cli.DISTILLATION / dataset / "teacher") as folder:
        if name:
            starts = sorted({params.student(student).weights for student in params.grid.students} - {"random"})
            content["model"] = cli.read_json(cli.MODELS / dataset / f"{name}.json")
            content["initial_weights"] = {
                start: cli.read_json(cli.WEIGHTS / start / "source.json") for start in starts
            }
            shutil.copy(cli.require(cli.HEADS / dataset / name / "head.pt"), folder)
        cli.write_json(folder / "teacher.json", content)


if __name__ == "__main__":
    cli.run(teacher)
