"""map: predict the class and the confidence of every pixel of a scene, by a student or an ensemble."""

from pathlib import Path

from pipeline import config
from pipeline.errors import UserError
from pipeline.mapping.predict_scene import class_shares, predict_scene
from pipeline.mapping.predictors import Predictor, load_onnx_student
from pipeline.mapping.scene import open_scene
from stages import cli


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
    predictor = load_onnx_student(Path(onnx)) if onnx else _load_torch_predictor(student, dataset, model)
    metadata = predict_scene(open_scene(Path(scene)), predictor, Path(out))
    print(f"{scene}: {class_shares(metadata)}\n{Path(out) / 'class.tif'}")


def _load_torch_predictor(student: str | None, dataset: str, model: str) -> Predictor:
    # torch takes 3 s to import; a map by onnxruntime needs none of it
    from pipeline.device import resolve_device
    from pipeline.mapping.torch_predictors import load_ensemble, load_torch_student

    params = config.load()
    device = resolve_device(params.compute.device)
    if student:
        return load_torch_student(Path(student), device)
    params.members(model)
    # Ensembles that the composition search selected have a folder of their own.
    heads = next((path for path in (cli.HEADS, cli.SELECTED_RUNS) if (path / dataset / model).exists()), cli.HEADS)
    return load_ensemble(
        params, device, head_path=heads / dataset / model / "head.pt", images_path=cli.images_path(dataset),
        features_dir=cli.FEATURES / dataset, weights_dir=cli.WEIGHTS,
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(map_scene)
