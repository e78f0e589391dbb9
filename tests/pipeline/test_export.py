"""Exported students on chips: the logits of torch, and the metadata that a map needs."""

import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import rasterio
import torch

from pipeline import export
from pipeline.bands import SENTINEL2
from pipeline.data import image_store, image_writer
from pipeline.distillation.student import Student, StudentSpec, load_student, save_student, student_metadata
from pipeline.errors import UserError
from pipeline.mapping.predict_scene import predict_scene
from pipeline.mapping.predictors import load_onnx_student, open_session
from pipeline.mapping.scene import open_scene
from pipeline.mapping.torch_predictors import load_torch_student
from pipeline.tasks import Classification
from tests.conftest import ROOT
from tests.errors import raises
from tests.pipeline.finetuning.conftest import make_images
from tests.pipeline.mapping.conftest import write_raster

# An export takes seconds: one process makes the exports that all tests share.
pytestmark = pytest.mark.xdist_group("export")

# A network of few layers: the export of the default student takes most of a minute (`make run` does it).
NETWORK = "test_efficientnet"
# Side of the chips and of the student's input: chips of segmentation are shrunk inside the graph, others enlarged.
SIDES = {"classification": (16, 32), "segmentation": (48, 32)}
BAND_NAMES = [band.common_name for band in SENTINEL2]


def create_student(images, input_size) -> Student:
    """A student with random weights whose BatchNorm statistics are those of the chips."""
    chips = images.image[:16].values.astype(np.float32)
    mean, std = chips.mean(axis=(0, 2, 3)), chips.std(axis=(0, 2, 3))
    spec = StudentSpec(NETWORK, chips.shape[1], len(images.attrs["classes"]), images.attrs["task"], input_size)
    torch.manual_seed(0)
    student = Student(spec, mean, std).train()
    with torch.no_grad():
        for _ in range(5):
            student(torch.from_numpy(chips))
    return student.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Function from a task to a student's folder, the images, and the description of its export."""
    exports = {}

    def export_student(task):
        if task not in exports:
            folder, (side, input_size) = tmp_path_factory.mktemp(task), SIDES[task]
            image_writer.write(make_images(task, side), folder / "scratch", folder / "images.zarr")
            images = image_store.open_images(folder / "images.zarr")
            metadata = student_metadata(images, task, "supervised", "random", None)
            save_student(folder, create_student(images, input_size), metadata)
            student, metadata = load_student(folder)
            (folder / "export").mkdir()
            int8 = task == "classification"
            description = export.write_exports(student, metadata, images, folder / "export", int8=int8, max_chips=16)
            exports[task] = folder, images, description
        return exports[task]

    return export_student


@pytest.mark.parametrize("task", SIDES)
def test_write_exports_files_predict_what_the_student_predicts(exported, task):
    folder, images, description = exported(task)
    student, _ = load_student(folder)
    chips = images.image[:7].values.astype(np.float32)  # of training: the export was checked with others
    with torch.inference_mode():
        expected = student(torch.from_numpy(chips)).numpy()
    assert expected.std() > 1e-3
    for count in (1, 3, 7):
        logits = open_session(folder / "export/student.onnx").run(None, {"chips": chips[:count]})[0]
        assert logits.shape == expected[:count].shape
        assert np.abs(logits - expected[:count]).max() < export.TOLERANCE * expected.std()
    program = export.load_predictor(folder / "export/student.pt2")
    assert export.relative_logit_error(student, program, chips) < export.TOLERANCE
    entries = description["files"]
    for name in entries.keys() - {"torch"}:
        assert entries[name]["bytes"] == (folder / "export" / name).stat().st_size
    throughputs = export.measure_throughputs(student, folder / "export", images.image[:4].values)
    assert throughputs.keys() == entries.keys()
    assert min(throughputs.values()) > 0
    assert entries["student.onnx"]["score"] == entries["torch"]["score"]
    if task == "classification":
        assert entries["student-int8.onnx"]["bytes"] < 0.5 * entries["student.onnx"]["bytes"]
        assert entries["student-int8.onnx"]["difference"] > entries["student.onnx"]["difference"]


def test_write_exports_files_contain_their_metadata(exported):
    folder, images, _ = exported("classification")
    for name in ("student.onnx", "student-int8.onnx"):
        signature = load_onnx_student(folder / "export" / name).signature
        assert [band.common_name for band in signature.bands] == BAND_NAMES
        assert [band.wavelength for band in signature.bands] == images.wavelength.values.tolist()
        assert (signature.task, signature.units, signature.gsd) == (Classification, "dn", 10.0)
        assert signature.size == (16, 16)
        assert signature.class_names == tuple(images.attrs["classes"])
    properties = open_session(folder / "export/student.onnx").get_modelmeta().custom_metadata_map
    assert properties["units"] == "dn"
    assert properties["bands"].startswith("coastal, blue, green, red")
    assert str(ROOT).encode() not in (folder / "export/student.onnx").read_bytes(), "a path of this machine"
    extra_files = {"eo_compose.json": ""}
    torch.export.load(folder / "export/student.pt2", extra_files=extra_files)
    assert json.loads(extra_files["eo_compose.json"])["units"] == "dn"


def test_check_exported_file_with_other_weights_is_refused_and_deleted(exported, tmp_path):
    folder, images, _ = exported("classification")
    model = onnx.load(folder / "export/student.onnx")
    bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("head.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 0.1, bias.name))
    path = tmp_path / "student.onnx"
    onnx.save(model, path)
    student, _ = load_student(folder)
    chips = images.image[:4].values.astype(np.float32)
    with raises(UserError, "student.onnx", export.TOLERANCE, key="students.network", path=path):
        export.check_exported(student, path, export.load_predictor(path), chips)
    assert not path.exists()


@pytest.mark.parametrize(
    ("key", "value"), [("units", "reflectance"), ("size", [32, 32]), ("classes", ["a", "b"]), ("task", "multilabel")]
)
def test_write_exports_student_of_other_images_is_refused(exported, tmp_path, key, value):
    folder, images, _ = exported("classification")
    student, metadata = load_student(folder)
    with raises(UserError, "classification", key=key, value=value):
        export.write_exports(student, {**metadata, key: value}, images, tmp_path, int8=False, max_chips=4)
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


def test_map_geotiff_is_classified_without_torch(exported, tmp_path):
    """The command maps one chip as a GeoTIFF: the class is the student's."""
    folder, images, _ = exported("classification")
    chip = images.image[7].values
    write_raster(tmp_path / "chip.tif", chip, BAND_NAMES)
    arguments = [tmp_path / "chip.tif", folder / "export/student.onnx", tmp_path / "map"]
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    student, metadata = load_student(folder)
    with torch.inference_mode():
        logits = student(torch.from_numpy(chip[None].astype(np.float32))).numpy()
    expected = int(logits.argmax())
    assert f"{metadata['classes'][expected]} 100.0%" in process.stdout
    with rasterio.open(tmp_path / "map/class.tif") as file:
        assert (file.read(1) == expected).all()
    with rasterio.open(tmp_path / "map/confidence.tif") as file:
        assert np.abs(file.read(1) - 100 * Classification.probabilities(logits).max()).max() <= 0.51


def test_predict_scene_by_torch_and_by_onnxruntime_gives_the_same_map(exported, tmp_path):
    folder, images, _ = exported("segmentation")
    pixels = np.concatenate(images.image[:3].values, axis=2)
    scene = open_scene(write_raster(tmp_path / "s.tif", pixels, BAND_NAMES, crs=None, transform=None))
    maps = []
    for name, predictor in (
        ("torch", load_torch_student(folder, "cpu")),
        ("onnx", load_onnx_student(folder / "export/student.onnx")),
    ):
        predict_scene(scene, predictor, tmp_path / name)
        with rasterio.open(tmp_path / name / "confidence.tif") as file:
            maps.append(file.read(1).astype(int))
        assert file.crs is None
    assert np.abs(maps[0] - maps[1]).max() <= 1
    assert maps[0].std() > 0
