"""scenes: the scene that a dataset was cut from, mapped by its exported student; nothing where none is described."""

from pathlib import Path

from cache.atomic import atomic_dir
from stages.cli import EXPORTED, MAPS, SCRATCH, read_json, run, write_json

SCENES = Path("scenes")


def map_scene(dataset: str, student: str) -> None:
    """Write results/map/<dataset>/<student>: the map of scenes/<dataset>.yaml, or map.json that says why not."""
    scene, final, exported = SCENES / f"{dataset}.yaml", MAPS / dataset / student, EXPORTED / dataset / student
    reason = read_json(exported / "export.json")["skipped"]
    if not scene.exists():
        reason = f"There is no {scene}."
    if reason:
        with atomic_dir(SCRATCH / f"map-{dataset}-{student}", final) as folder:
            write_json(folder / "map.json", {"skipped": reason})
        print(f"left out: {reason}")
        return
    from pipeline.mapping import predict_scene
    from pipeline.mapping.exported import load_onnx_student as student_of
    from pipeline.mapping.open_scene import open_scene

    told = predict_scene.predict_scene(open_scene(scene), student_of(exported / "student.onnx"), final)
    print(f"{dataset} {student}: {predict_scene.class_shares(told)}")


if __name__ == "__main__":
    run(map_scene, "dataset", "student")
