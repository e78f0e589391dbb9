"""The stages export and map on the small grid, and the command map: results and errors."""

import json
import shutil

import numpy as np
import pytest
import rasterio

from pipeline.mapping.scene import open_scene
from tests.stages.conftest import SMALL

SCENE = ["--scene", "scenes/sample-landuse-seg.yaml"]
ONNX = ["--onnx", "results/export/sample-landuse-seg/small/student.onnx"]


def test_export_and_map_write_files_maps_and_report(job):
    results = job.folder / "results"
    page = (results / "report/index.html").read_text()
    for dataset in SMALL["grid"]["datasets"]:
        summary = json.loads((results / f"export/{dataset}/small/export.json").read_text())
        files = {name: entry for name, entry in summary["files"].items() if name != "torch"}
        assert set(files) == {"student.onnx", "student.pt2", "student-int8.onnx"}
        for name, entry in files.items():
            assert (results / f"export/{dataset}/small/{name}").stat().st_size == entry["bytes"]
            assert entry["images_per_second"] > 0
            assert name in page
        assert max(files[name]["difference"] for name in ("student.onnx", "student.pt2")) <= summary["tolerance"]
        assert page.count(f"Map of the scene of {dataset}") == 1
    scene = open_scene(job.folder / "scenes/sample-landuse-seg.yaml")
    for name in ("class", "confidence"):
        with rasterio.open(results / f"map/sample-landuse-seg/small/{name}.tif") as file:
            assert file.shape == (scene.height, scene.width)
            assert tuple(file.transform)[:6] == scene.transform
            assert file.crs == rasterio.CRS.from_wkt(scene.crs)
            assert (file.read(1) != 255).all()
    maps = [path.name for path in (results / "map/sample-trees/small").glob("*.tif")]
    assert sorted(maps) == ["class.tif", "confidence.tif"]


def test_map_dataset_without_a_scene_is_skipped(job, tmp_path):
    scene, folder = job.folder / "scenes/sample-trees.yaml", job.folder / "results/map/sample-trees/small"
    scene.rename(tmp_path / scene.name), shutil.copytree(folder, tmp_path / "map")
    job.stage("map_dataset", "--dataset", "sample-trees", "--student", "small")
    assert "scenes/sample-trees.yaml" in json.loads((folder / "map.json").read_text())["skipped"]
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "map", folder), (tmp_path / scene.name).rename(scene)


@pytest.mark.slow
def test_map_ensemble_and_student_cover_the_scene(job, tmp_path):
    ensemble = ["--dataset", "sample-landuse-seg", "--model", "csmask_b4+lite0"]
    student = ["--student", "results/distill/sample-landuse-seg/small/best"]
    for name, predictor in (("ensemble", ensemble), ("student", student)):
        job.run("python", "-m", "stages.map", *SCENE, "--out", str(tmp_path / name), *predictor)
    maps = {name: rasterio.open(tmp_path / name / "class.tif").read(1) for name in ("ensemble", "student")}
    assert maps["ensemble"].shape == maps["student"].shape == (768, 1536)
    with rasterio.open(job.folder / "results/map/sample-landuse-seg/small/class.tif") as file:
        assert (maps["student"] == file.read(1)).mean() > 0.999  # torch and onnxruntime
    assert json.loads((tmp_path / "ensemble/map.json").read_text())["model"] == "csmask_b4+lite0"
    assert len(np.unique(maps["ensemble"])) > 1


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (SCENE, ["--onnx", "--student", "--dataset", "--model"]),
        ([*SCENE, *ONNX, "--student", "x"], ["--onnx", "--student", "--dataset", "--model"]),
        ([*SCENE, "--onnx", "x.onnx"], ["x.onnx"]),
        ([*SCENE, "--student", "x"], ["x"]),
        ([*SCENE, "--dataset", "sample-landuse-seg", "--model", "raw+lite0"], ["results/heads", "raw+lite0"]),
        (["--scene", "nowhere.tif", *ONNX], ["nowhere.tif"]),
        (["--scene", "scenes/sample-trees.yaml", *ONNX], ["coastal", "red", "0.665", "green"]),
    ],
    ids=["no predictor", "two predictors", "no file", "no student", "no head", "no scene", "no bands"],
)
def test_map_missing_input_is_refused(job, tmp_path, arguments, mentions):
    error = job.stage_error("map", *arguments, "--out", str(tmp_path / "map"))
    assert all(value in str(error) for value in mentions), error
    assert not (tmp_path / "map").exists()


def test_export_missing_student_is_refused(job):
    assert "results/distill" in str(job.stage_error("export", "--dataset", "sample-trees", "--student", "medium"))
