"""map: predict the class and the confidence of every pixel of a scene, by a student or an ensemble."""

from pathlib import Path

from pipeline.errors import UserError
from pipeline.mapping.predict_scene import class_shares, predict_scene
from pipeline.mapping.predictors import Predictor, load_onnx_student
from pipeline.mapping.scene import open_scene
from stages.cli import FEATURES, HEADS, IMAGES, SELECTED_RUNS, WEIGHTS, run


def map_scene(
    scene: str, out: str, onnx: str | None, student: str | None, dataset: str | None, model: str | None
) -> None:
    """Write class.tif, confidence.tif and map.json to a folder.

    The maps are Cloud Optimized GeoTIFFs on the scene's grid.

    The predictor is --onnx FILE (an exported student, without torch), --student FOLDER (a trained student), or
    --dataset and --model (an ensemble of frozen backbones with its trained head). --scene is a raster that names its
    bands and units, a YAML file that describes one, or a Zarr store. A killed run resumes after its last block.
    """
    predictors = [bool(onnx), bool(student), bool(dataset and model)]
    if sum(predictors) != 1 or bool(dataset) != bool(model):
        raise UserError("Choose one predictor: --onnx FILE, or --student FOLDER, or both --dataset and --model.")
    metadata = predict_scene(open_scene(Path(scene)), _load_predictor(onnx, student, dataset, model), Path(out))
    print(f"{scene}: {class_shares(metadata)}\n{Path(out) / 'class.tif'}")


def _load_predictor(onnx: str | None, student: str | None, dataset: str | None, model: str | None) -> Predictor:
    """Load the predictor that the arguments name."""
    if onnx:
        return load_onnx_student(Path(onnx))
    # torch takes 3 s to import; a map by onnxruntime needs none of it
    from pipeline import config
    from pipeline.device import resolve_device
    from pipeline.mapping.torch_predictors import EnsemblePaths, load_ensemble, load_torch_student

    params = config.load()
    device = resolve_device(params.compute.device)
    if student:
        return load_torch_student(Path(student), device)
    params.members(model)
    # Ensembles that the composition search selected have a folder of their own.
    folder = next((folder for folder in (HEADS, SELECTED_RUNS) if (folder / dataset / model).exists()), HEADS)
    paths = EnsemblePaths(
        folder / dataset / model / "head.pt", IMAGES / f"{dataset}.zarr", FEATURES / dataset, WEIGHTS
    )
    return load_ensemble(params, paths, device)


if __name__ == "__main__":
    run(
        map_scene, "scene", "out",
        options={
            "onnx": "file of an exported student",
            "student": "folder of a trained student",
            "dataset": "dataset on which --model was trained",
            "model": "backbones joined by +, as in params.yaml's grid",
        },
    )  # fmt: skip
