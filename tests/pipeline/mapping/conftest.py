"""Models with known maps: a linear function of each pixel, in an ONNX file."""

import json

import numpy as np
import onnx
import pytest
import rasterio
from onnx import TensorProto, helper, numpy_helper

from pipeline.bands import SENTINEL2
from pipeline.mapping.predictors import METADATA_KEY
from pipeline.mapping.scene import SceneConfig, scene_from_rasters

BANDS = [band for band in SENTINEL2 if band.common_name in ("blue", "nir", "swir16")]
# Three classes of three bands in DN, each frequent in the sample scene.
WEIGHT = np.array([[4, -1, 0], [0, 1.5, -1], [-1, 0, 0.6]], np.float32) / 600
BIAS = -WEIGHT @ np.array([1456, 1728, 1920], np.float32)


def write_linear_model(path, tile, task="segmentation", metadata_key=METADATA_KEY):
    """Write an ONNX file with logits `WEIGHT` @ bands + `BIAS` of each pixel, or of the chip's mean."""
    weight = numpy_helper.from_array(WEIGHT[:, :, None, None], "weight")
    nodes = [helper.make_node("Conv", ["chips", "weight", "bias"], ["dense"])]
    shape = ["batch", len(BIAS), tile, tile]
    if task != "segmentation":
        nodes += [
            helper.make_node("GlobalAveragePool", ["dense"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["flat"]),
        ]
        shape = shape[:2]
    nodes[-1].output[0] = "logits"
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("chips", TensorProto.FLOAT, ["batch", 3, tile, tile])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [weight, numpy_helper.from_array(BIAS, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    bands = [{"name": band.name, "common_name": band.common_name, "wavelength": band.wavelength} for band in BANDS]
    metadata = {
        "dataset": "synthetic",
        "task": task,
        "classes": ["a", "b", "c"],
        "ignore": 255,
        "units": "dn",
        "gsd": 10.0,
        "size": [tile, tile],
        "bands": bands,
    }
    helper.set_model_props(model, {metadata_key: json.dumps(metadata)})
    onnx.save(model, path)
    return path


@pytest.fixture
def linear_model(tmp_path):
    """Function from the side of a tile to the path of a linear model."""
    return lambda tile=32, **changes: write_linear_model(tmp_path / f"linear{tile}.onnx", tile, **changes)


@pytest.fixture
def landuse_scene(raw_folder):
    """The Sentinel-2 scene of the land use dataset, from one file per band."""
    paths = sorted(raw_folder("osm_landuse").glob("*_B??.jp2"))
    return scene_from_rasters(paths, SceneConfig("", "dn", SENTINEL2))


@pytest.fixture
def write_geotiff(tmp_path):
    """Function from pixels (band, y, x) to a GeoTIFF that names its bands and units."""

    def write(values, name="scene.tif", units="dn", band_names=None, nodata=None, transform=None, crs="EPSG:32633"):
        path = tmp_path / name
        with rasterio.open(
            path, "w", driver="GTiff", height=values.shape[1], width=values.shape[2], count=len(values),
            dtype=values.dtype, nodata=nodata, crs=crs,
            transform=transform or rasterio.Affine(10, 0, 400000, 0, -10, 5800000),
        ) as file:  # fmt: skip
            file.write(values)
            file.descriptions = band_names or [band.common_name for band in BANDS]
            file.update_tags(units=units)
        return path

    return write
