"""Models whose maps are known beforehand: a linear function of each pixel, as a real ONNX file."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.bands import SENTINEL2
from pipeline.mapping.predictors import METADATA_KEY
from pipeline.mapping.open_scene import SceneConfig, scene_from_rasters

BANDS = [band for band in SENTINEL2 if band.common_name in ("blue", "nir", "swir16")]
# Three classes of three bands in DN, each frequent in the sample scene.
WEIGHT = np.array([[4, -1, 0], [0, 1.5, -1], [-1, 0, 0.6]], np.float32) / 600
BIAS = -WEIGHT @ np.array([1456, 1728, 1920], np.float32)


def linear_model(path, tile, bands=BANDS, task="segmentation", units="dn", gsd=10.0, size=None):
    """An ONNX file: logits `WEIGHT` @ bands + `BIAS` of each pixel, or of the chip's mean for other tasks."""
    weight = numpy_helper.from_array(WEIGHT[:, :, None, None], "weight")
    nodes = [helper.make_node("Conv", ["chips", "weight", "bias"], ["dense"])]
    shape = ["batch", len(BIAS), tile, tile]
    if task != "segmentation":
        nodes += [helper.make_node("GlobalAveragePool", ["dense"], ["mean"]),
                  helper.make_node("Flatten", ["mean"], ["flat"])]  # fmt: skip
        shape = shape[:2]
    nodes[-1].output[0] = "logits"
    graph = helper.make_graph(
        nodes, "linear", [helper.make_tensor_value_info("chips", TensorProto.FLOAT, ["batch", 3, tile, tile])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [weight, numpy_helper.from_array(BIAS, "bias")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    told = {
        "dataset": "made", "task": task, "classes": ["a", "b", "c"], "ignore": 255, "units": units, "gsd": gsd,
        "size": size or [tile, tile],
        "bands": [{"name": b.name, "common_name": b.common_name, "wavelength": b.wavelength} for b in bands],
    }  # fmt: skip
    helper.set_model_props(model, {METADATA_KEY: json.dumps(told)})
    onnx.save(model, path)
    return path


@pytest.fixture
def linear(tmp_path):
    """From a tile's side to such a file."""
    return lambda tile=32, **changes: linear_model(tmp_path / f"linear{tile}.onnx", tile, **changes)


@pytest.fixture
def landuse_scene(raw_folder):
    """The real Sentinel-2 scene, a file a band."""
    return scene_from_rasters(sorted(raw_folder("osm_landuse").glob("*_B??.jp2")), SceneConfig("", "dn", SENTINEL2))
