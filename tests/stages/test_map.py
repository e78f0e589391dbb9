"""The stages export and map on the small grid, and the command that maps: what is left, and mistakes in words."""

import json

import numpy as np
import pytest
import rasterio

from pipeline.mapping.open_scene import open_scene
from tests.stages.test_bad_input import stage


def test_what_the_grid_leaves(job):
    results = job.folder / "results"
    for dataset in ("sample-landuse-seg", "sample-trees"):
        told = json.loads((results / f"export/{dataset}/small/export.json").read_text())
        files = {name: one for name, one in told["files"].items() if name != "torch"}
        assert set(files) == {"student.onnx", "student.pt2", "student-int8.onnx"}
        for name, one in files.items():
            assert (results / f"export/{dataset}/small/{name}").stat().st_size == one["bytes"]
        assert max(files[name]["difference"] for name in ("student.onnx", "student.pt2")) <= told["tolerance"]
    scene = open_scene(job.folder / "scenes/sample-landuse-seg.yaml")
    for name in ("class", "confidence"):
        with rasterio.open(results / f"map/sample-landuse-seg/small/{name}.tif") as file:
            assert file.shape == (scene.height, scene.width)
            assert tuple(file.transform)[:6] == scene.transform
            assert file.crs == rasterio.CRS.from_wkt(scene.crs)
            assert (file.read(1) != 255).all()
    assert "no scenes/sample-trees.yaml" in (results / "map/sample-trees/small/map.json").read_text()
    page = (results / "report/index.html").read_text()
    assert "<h2>Exported students</h2>" in page
    assert page.count("Map of the scene of sample-landuse-seg") == 1


@pytest.mark.slow
def test_an_ensemble_and_a_student_map_the_scene(job, tmp_path):
    scene = ["--scene", "scenes/sample-landuse-seg.yaml", "--out"]
    ensemble = ["--dataset", "sample-landuse-seg", "--model", "csmask_b4+lite0"]
    job.run("python", "-m", "stages.map", *scene, str(tmp_path / "ensemble"), *ensemble)
    student = ["--student", "results/distill/sample-landuse-seg/small/best"]
    job.run("python", "-m", "stages.map", *scene, str(tmp_path / "student"), *student)
    maps = {name: rasterio.open(tmp_path / name / "class.tif").read(1) for name in ("ensemble", "student")}
    assert maps["ensemble"].shape == maps["student"].shape == (768, 1536)
    with rasterio.open(job.folder / "results/map/sample-landuse-seg/small/class.tif") as file:
        assert (maps["student"] == file.read(1)).mean() > 0.999  # by torch, and by onnxruntime
    assert json.loads((tmp_path / "ensemble/map.json").read_text())["model"] == "csmask_b4+lite0"
    assert len(np.unique(maps["ensemble"])) > 1


def test_mistakes(job, tmp_path):
    scene, out = ["--scene", "scenes/sample-landuse-seg.yaml"], ["--out", str(tmp_path / "map")]
    onnx = ["--onnx", "results/export/sample-landuse-seg/small/student.onnx"]
    trees = ["--scene", "scenes/sample-trees-seg.yaml"]
    (job.folder / "data/raw/sample-trees-seg").symlink_to("sample-trees")
    try:
        said = stage(job, "map", *trees, *onnx, *out)
    finally:
        (job.folder / "data/raw/sample-trees-seg").unlink()
    assert "lacks the bands coastal" in said
    assert "it has red (0.665 µm), green" in said
    assert "Say what maps" in stage(job, "map", *scene, *out)
    assert "Say what maps" in stage(job, "map", *scene, *out, *onnx, "--student", "x")
    assert "no exported student at x.onnx" in stage(job, "map", *scene, *out, "--onnx", "x.onnx")
    assert "no student in x" in stage(job, "map", *scene, *out, "--student", "x")
    model = ["--dataset", "sample-landuse-seg", "--model", "raw+lite0"]
    assert "no trained head at results/runs" in stage(job, "map", *scene, *out, *model)
    assert "no scene at nowhere.tif" in stage(job, "map", "--scene", "nowhere.tif", *out, *onnx)
    assert "There is no results/distill" in stage(job, "export", "--dataset", "sample-trees", "--student", "x")
    assert "There is no dataset 'x'" in stage(job, "export", "--dataset", "x", "--student", "small")
    assert not (tmp_path / "map").exists()
