"""map_dataset: map the scene from which a dataset was cut by the dataset's exported student."""

from pathlib import Path

from stages import cli

SCENES = Path("scenes")


def map_dataset(dataset: str, student: str) -> None:
    """Write results/map/<dataset>/<student>: the map of scenes/<dataset>.yaml.

    Without that file, or without a student, only map.json is written, with the reason.
    """
    scene, exported = SCENES / f"{dataset}.yaml", cli.EXPORTS / dataset / student
    reason = cli.read_json(exported / "export.json")["skipped"]
    if not scene.exists():
        reason = f"There is no {scene}."
    if reason:
        cli.publish_skipped(cli.MAPS / dataset / student, "map.json", reason)
        return
    # rasterio and onnxruntime take 1 s to import; a dataset without a scene needs neither
    from pipeline.mapping.predict_scene import class_shares, predict_scene
    from pipeline.mapping.predictors import load_onnx_student
    from pipeline.mapping.scene import open_scene

    predictor = load_onnx_student(exported / "student.onnx")
    metadata = predict_scene(open_scene(scene), predictor, cli.MAPS / dataset / student)
    print(f"{dataset} {student}: {class_shares(metadata)}")


if __name__ == "__main__":
    cli.run(map_dataset)
