"""Exported students on real chips: the same answers as in torch, and what a map needs to know beside them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import rasterio
import torch

from pipeline.data import image_store
from pipeline.distillation.student import Student, StudentSpec, load_student, save_student
from pipeline.errors import UserError
from pipeline.export import files, graphs
from pipeline.mapping.open_scene import open_scene
from pipeline.mapping.predict_scene import predict_scene
from pipeline.mapping.predictors import load_onnx_student, open_session
from pipeline.mapping.torch_predictors import load_torch_student
from pipeline.tasks import Classification
from tests.conftest import ROOT

# An export takes seconds: one process makes those that all tests share.
pytestmark = pytest.mark.xdist_group("export")


# The default student's kind, whose export takes most of a minute (`make run` does it), and one of a few layers.
MOBILENET, SMALL = "mobilenetv3_small_050", "test_efficientnet"


def student_of(opened_images, side, network):
    """A network whose BatchNorm has seen real chips; its other weights are drawn."""
    chips = opened_images.image[:16].values.astype(np.float32)
    mean, std = chips.mean(axis=(0, 2, 3)), chips.std(axis=(0, 2, 3))
    shape = StudentSpec(
        network,
        chips.shape[1],
        len(opened_images.attrs["classes"]),
        opened_images.attrs["task"],
        side,
    )
    torch.manual_seed(0)
    student = Student(shape, mean, std).train()
    with torch.no_grad():
        for _ in range(5):
            student(torch.from_numpy(chips))
    return student.eval()


def told_of(opened_images, dataset):
    attributes = opened_images.attrs
    bands = [{"name": b.name, "common_name": b.common_name, "wavelength": b.wavelength}
             for b in image_store.image_bands(opened_images)]  # fmt: skip
    return {
        "dataset": dataset, "task": attributes["task"], "classes": attributes["classes"], "ignore": image_store.IGNORE,
        "bands": bands, "units": attributes["units"], "gsd": attributes["gsd"],
        "size": [opened_images.sizes["y"], opened_images.sizes["x"]], "variant": "supervised", "weights": "random",
        "teacher": None,
    }  # fmt: skip


@pytest.fixture(scope="module")
def saved(images_path, tmp_path_factory):
    """From a data set's name to the folder of a student of it, and its exported files."""
    made = {}

    def save(dataset, side, network=SMALL):
        if (dataset, network) not in made:
            folder = tmp_path_factory.mktemp(dataset)
            pictures = image_store.open_images(images_path(dataset))
            save_student(folder, student_of(pictures, side, network), told_of(pictures, dataset))
            student, told = load_student(folder)
            (folder / "export").mkdir()
            said = files.write_exports(student, told, pictures, folder / "export", int8=True, limit=16)
            made[dataset, network] = folder, pictures, said
        return made[dataset, network]

    return save


# Chips of trees are shrunk inside the graph, with antialiasing; those of land use are enlarged.
@pytest.mark.parametrize(
    ("dataset", "side", "network"),
    [
        ("sample-landuse", 32, SMALL),
        pytest.param("sample-landuse", 32, MOBILENET, marks=pytest.mark.slow),
        pytest.param("sample-trees-seg", 64, MOBILENET, marks=pytest.mark.slow),
    ],
)
def test_files_say_what_the_student_says(saved, dataset, side, network):
    folder, pictures, said = saved(dataset, side, network)
    student, _ = load_student(folder)
    chips = pictures.image[20:30].values.astype(np.float32)  # others than those it was exported with
    with torch.inference_mode():
        wanted = student(torch.from_numpy(chips)).numpy()
    assert wanted.std() > 1e-3
    for count in (1, 3, 10):
        given = open_session(folder / "export/student.onnx").run(None, {"chips": chips[:count]})[0]
        assert given.shape == wanted[:count].shape
        assert np.abs(given - wanted[:count]).max() < graphs.TOLERANCE * wanted.std()
    assert graphs.relative_logit_error(student, graphs.load_predictor(folder / "export/student.pt2"), chips) < graphs.TOLERANCE
    for name in ("student.onnx", "student.pt2", "student-int8.onnx"):
        assert said["files"][name]["bytes"] == (folder / "export" / name).stat().st_size
    rates = files.measure_throughputs(student, folder / "export", pictures.image[:4].values)
    assert rates.keys() == said["files"].keys()
    assert min(rates.values()) > 0
    assert said["files"]["student.onnx"]["score"] == said["files"]["torch"]["score"]
    small = said["files"]["student-int8.onnx"]
    assert small["bytes"] < 0.5 * said["files"]["student.onnx"]["bytes"]
    assert small["difference"] > said["files"]["student.onnx"]["difference"]


def test_the_file_describes_itself(saved):
    folder, pictures, _ = saved("sample-landuse", 32)
    for name in ("student.onnx", "student-int8.onnx"):
        signature = load_onnx_student(folder / "export" / name).signature
        assert [band.common_name for band in signature.bands] == pictures.band.values.tolist()
        assert [band.wavelength for band in signature.bands] == pictures.wavelength.values.tolist()
        assert (signature.task, signature.units, signature.gsd) == ("classification", "dn", 10.0)
        assert signature.size == (16, 16)
        assert signature.classes == tuple(pictures.attrs["classes"])
    said = open_session(folder / "export/student.onnx").get_modelmeta().custom_metadata_map
    assert said["units"] == "dn"
    assert said["bands"].startswith("coastal, blue, green, red")
    assert str(ROOT).encode() not in (folder / "export/student.onnx").read_bytes(), "a path of this machine"
    extra = {"eo_compose.json": ""}
    torch.export.load(folder / "export/student.pt2", extra_files=extra)
    assert json.loads(extra["eo_compose.json"])["units"] == "dn"


def test_a_file_that_computes_something_else_is_refused(saved, tmp_path):
    folder, pictures, _ = saved("sample-landuse", 32)
    model = onnx.load(folder / "export/student.onnx")
    last = next(one for one in model.graph.initializer if one.name.endswith("head.bias"))
    last.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(last) + 0.1, last.name))
    onnx.save(model, tmp_path / "student.onnx")
    student, _ = load_student(folder)
    path, chips = tmp_path / "student.onnx", pictures.image[:4].values.astype(np.float32)
    file = graphs.load_predictor(path)
    with pytest.raises(UserError, match=r"student.onnx differs from torch by .* more than 0.001 allows"):
        graphs.check_exported(student, path, file, chips)
    assert not (tmp_path / "student.onnx").exists()


def test_a_student_of_other_images(saved, images_path, tmp_path):
    folder, pictures, _ = saved("sample-landuse", 32)
    student, told = load_student(folder)
    with pytest.raises(UserError, match="has the units reflectance, and the images of sample-landuse have dn"):
        files.write_exports(student, {**told, "units": "reflectance"}, pictures, tmp_path, int8=False, limit=4)
    assert not list(tmp_path.iterdir())


WITHOUT_TORCH = """
import sys
sys.argv = ["map", "--scene", sys.argv[1], "--onnx", sys.argv[2], "--out", sys.argv[3]]
import runpy
runpy.run_module("stages.map", run_name="__main__")
loaded = {name.split(".")[0] for name in sys.modules}
assert "onnxruntime" in loaded
assert not loaded & {"torch", "timm", "terratorch", "torchvision"}, loaded
"""


def test_a_geotiff_is_classified_without_torch(saved, tmp_path, raw_folder):
    """A chip of the data set as a GeoTIFF, by the command: the class that the student gives the chip."""
    folder, pictures, _ = saved("sample-landuse", 32)
    chip = pictures.image[7].values
    with rasterio.open(
        tmp_path / "chip.tif", "w", driver="GTiff", height=16, width=16, count=13, dtype="uint16", crs="EPSG:32633",
        transform=rasterio.Affine(10, 0, 4e5, 0, -10, 58e5),
    ) as file:  # fmt: skip
        file.write(chip)
        file.descriptions = pictures.band.values.tolist()
        file.update_tags(units="dn")
    command = [sys.executable, "-c", WITHOUT_TORCH, tmp_path / "chip.tif", folder / "export/student.onnx"]
    done = subprocess.run(
        [*map(str, command), str(tmp_path / "map")], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    student, told = load_student(folder)
    with torch.inference_mode():
        logits = student(torch.from_numpy(chip[None].astype(np.float32))).numpy()
    wanted = int(logits.argmax())
    assert f"{told['classes'][wanted]} 100.0%" in done.stdout
    with rasterio.open(tmp_path / "map/class.tif") as file:
        assert (file.read(1) == wanted).all()
    with rasterio.open(tmp_path / "map/confidence.tif") as file:
        assert np.abs(file.read(1) - 100 * Classification.probabilities(logits).max()).max() <= 0.51


def test_maps_by_torch_and_by_onnxruntime_are_the_same(saved, tmp_path, raw_folder):
    folder, _, _ = saved("sample-trees-seg", 64)
    picture = sorted(raw_folder("neon_trees").glob("*crop.png"))[-1]
    with rasterio.open(picture) as file:
        crop = file.read()[:3, :300, :500]
    with rasterio.open(
        tmp_path / "crop.tif", "w", driver="GTiff", height=300, width=500, count=3, dtype="uint8"
    ) as file:
        file.write(crop)
        file.descriptions = ["red", "green", "blue"]
        file.update_tags(units="uint8")
    scene, maps = open_scene(tmp_path / "crop.tif"), []
    for name, one in (("torch", load_torch_student(folder, "cpu")), ("onnx", load_onnx_student(folder / "export/student.onnx"))):
        predict_scene(scene, one, tmp_path / name)
        with rasterio.open(tmp_path / name / "confidence.tif") as file:
            maps.append(file.read(1).astype(int))
        assert file.crs is None
    assert np.abs(maps[0] - maps[1]).max() <= 1
    assert maps[0].std() > 0


def test_files_that_are_no_students(tmp_path, saved):
    (tmp_path / "x.onnx").write_bytes(b"not ONNX")
    with pytest.raises(UserError, match="cannot be read as ONNX"):
        load_onnx_student(tmp_path / "x.onnx")
    with pytest.raises(UserError, match="no exported student at"):
        load_onnx_student(tmp_path / "y.onnx")
    folder, _, _ = saved("sample-landuse", 32)
    model = onnx.load(folder / "export/student.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "z.onnx")
    with pytest.raises(UserError, match="does not say which bands and classes"):
        load_onnx_student(Path(tmp_path / "z.onnx"))
