"""scenes: the scene that a dataset was cut from, mapped by its exported student; nothing where none is described."""

from pathlib import Path

from cache.durable import building
from stages.cli import EXPORTED, MAPS, SCRATCH, read_json, run, write_json

SCENES = Path("scenes")


def map_scene(dataset: str, student: str) -> None:
    """Write results/map/<dataset>/<student>: the map of scenes/<dataset>.yaml, or map.json that says why not."""
    scene, final, exported = SCENES / f"{dataset}.yaml", MAPS / dataset / student, EXPORTED / dataset / student
    reason = read_json(exported / "export.json")["left_out"]
    if not scene.exists():
        reason = f"There is no {scene}."
    if reason:
        with building(SCRATCH / f"map-{dataset}-{student}", final) as folder:
            write_json(folder / "map.json", {"left_out": reason})
        print(f"left out: {reason}")
        return
    from pipeline.mapping import make
    from pipeline.mapping.exported import exported as student_of
    from pipeline.mapping.sources import open_scene

    told = make.make(open_scene(scene), student_of(exported / "student.onnx"), final)
    print(f"{dataset} {student}: {make.shares(told)}")


if __name__ == "__main__":
    run(map_scene, "dataset", "student")
