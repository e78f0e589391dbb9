"""map_dataset: map the scene from which a dataset was cut by the dataset's exported student."""

from pathlib import Path

from cache.atomic import atomic_dir
from stages.cli import EXPORTS, MAPS, SCRATCH, read_json, run, write_json

SCENES = Path("scenes")


def map_dataset(dataset: str, student: str) -> None:
    """Write results/map/<dataset>/<student>: the map of scenes/<dataset>.yaml.

    Without that file, or without a student, only map.json is written, with the reason.
    """
    scene, final, exported = SCENES / f"{dataset}.yaml", MAPS / dataset / student, EXPORTS / dataset / student
    reason = read_json(exported / "export.json")["skipped"]
    if not scene.exists():
        reason = f"There is no {scene}."
    if reason:
        with atomic_dir(SCRATCH / f"map-{dataset}-{student}", final) as folder:
            write_json(folder / "map.json", {"skipped": reason})
        print(f"skipped: {reason}")
        return
    # rasterio and onnxruntime take 1 s to import; a dataset without a scene needs neither
    from pipeline.mapping.predict_scene import class_shares, predict_scene
    from pipeline.mapping.predictors import load_onnx_student
    from pipeline.mapping.scene import open_scene

    metadata = predict_scene(open_scene(scene), load_onnx_student(exported / "student.onnx"), final)
    print(f"{dataset} {student}: {class_shares(metadata)}")


if __name__ == "__main__":
    run(map_dataset, "dataset", "student")
