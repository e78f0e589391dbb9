"""map: a scene of any size becomes a map of classes and one of confidence, by a student or an ensemble."""

from pathlib import Path

from pipeline.errors import UserError
from pipeline.mapping import predict_scene as maps
from pipeline.mapping.open_scene import open_scene
from stages.cli import COMPOSED, FEATURES, IMAGES, RUNS, WEIGHTS, run


def make_map(scene: str, out: str, onnx: str | None, student: str | None, dataset: str | None,
             model: str | None) -> None:  # fmt: skip
    """Write class.tif, confidence.tif (Cloud Optimized GeoTIFFs on the scene's grid) and map.json to a folder.

    What maps: --onnx FILE (an exported student, without torch), --student FOLDER (one as it was trained), or
    --dataset and --model (an ensemble of frozen backbones with its trained head). --scene is a raster that names its
    bands and units, a YAML file that describes one, or a Zarr store. A killed run goes on from its last block.
    """
    given = [bool(onnx), bool(student), bool(dataset and model)]
    if sum(given) != 1 or bool(dataset) != bool(model):
        raise UserError("Say what maps: either --onnx FILE, or --student FOLDER, or both --dataset and --model.")
    opened = open_scene(Path(scene))
    told = maps.predict_scene(opened, _predictor(onnx, student, dataset, model), Path(out))
    print(f"{scene}: {maps.class_shares(told)}\n{Path(out) / 'class.tif'}")


def _predictor(onnx: str | None, student: str | None, dataset: str | None, model: str | None):
    """The predictor that was asked for; torch is imported for what needs it alone."""
    if onnx:
        from pipeline.mapping.exported import load_onnx_student

        return load_onnx_student(Path(onnx))
    from pipeline import config
    from pipeline.data import image_store
    from pipeline.device import resolve_device

    described = config.load()
    where = resolve_device(described.compute.device)
    if student:
        from pipeline.mapping.students import load_student

        return load_student(Path(student), where)
    from pipeline.mapping.predictors import EnsemblePaths, load_ensemble

    described.members(model)
    pictures = image_store.open_images(IMAGES / f"{dataset}.zarr")
    # A model that the composition search chose is kept with it.
    folder = next((one for one in (RUNS, COMPOSED) if (one / dataset / model).exists()), RUNS)
    places = EnsemblePaths(folder / dataset / model / "head.pt", pictures, FEATURES / dataset, WEIGHTS)
    return load_ensemble(described, places, where)


if __name__ == "__main__":
    run(
        make_map, "scene", "out",
        options={
            "onnx": "an exported student",
            "student": "the folder of a trained student",
            "dataset": "that --model was trained on",
            "model": "backbones joined by +, as in params.yaml's grid",
        },
    )  # fmt: skip
