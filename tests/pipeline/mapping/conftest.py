"""Models with known maps: a linear function of each pixel, in an ONNX file."""

import json

import numpy as np
import onnx
import pytest
import rasterio
from onnx import TensorProto, helper, numpy_helper

from pipeline.bands import SENTINEL2
from pipeline.mapping.predictors import METADATA_KEY

BANDS = [band for band in SENTINEL2 if band.common_name in ("blue", "nir", "swir16")]
# Three classes of three bands in DN, each frequent in the sample scene.
WEIGHT = np.array([[4, -1, 0], [0, 1.5, -1], [-1, 0, 0.6]], np.float32) / 600
BIAS = -WEIGHT @ np.array([1456, 1728, 1920], np.float32)
GRID = rasterio.Affine(10, 0, 400000, 0, -10, 5800000)


def write_linear_model(path, tile, task="segmentation", metadata_key=METADATA_KEY):
    """Write an ONNX file with logits `WEIGHT` @ bands + `BIAS` of each pixel, or of the chip's mean."""
    weight = numpy_helper.from_array(WEIGHT[:, :, None, None], "weight")
    nodes = [helper.make_node("Conv", ["chips", "weight", "bias"], ["dense"])]
    if task != "segmentation":
        nodes.append(helper.make_node("GlobalAveragePool", ["dense"], ["mean"]))
        nodes.append(helper.make_node("Flatten", ["mean"], ["flat"]))
    nodes[-1].output[0] = "logits"
    chips = helper.make_tensor_value_info("chips", TensorProto.FLOAT, ["batch", 3, tile, tile])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "linear", [chips], [logits], [weight, numpy_helper.from_array(BIAS, "bias")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    metadata = {
        "dataset": "synthetic", "task": task, "classes": ["a", "b", "c"], "ignore": 255, "units": "dn", "gsd": 10.0,
        "size": [tile, tile],
        "bands": [{key: getattr(band, key) for key in ("name", "common_name", "wavelength")} for band in BANDS],
    }  # fmt: skip
    helper.set_model_props(model, {metadata_key: json.dumps(metadata)})
    onnx.save(model, path)
    return path


def write_raster(path, values, band_names=(), units="dn", transform=GRID, crs="EPSG:32633", nodata=None):
    """Write pixels (band, y, x) as a GeoTIFF that names its bands and units."""
    count, height, width = values.shape
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=count, dtype=values.dtype, nodata=nodata,
        crs=crs, transform=transform,
    ) as file:  # fmt: skip
        file.write(values)
        file.descriptions = band_names or [band.common_name for band in BANDS]
        file.update_tags(units=units)
    return path


@pytest.fixture
def linear_model(tmp_path):
    """Function from the side of a tile to the path of a linear model."""
    return lambda tile=32, **changes: write_linear_model(tmp_path / f"linear{tile}.onnx", tile, **changes)


@pytest.fixture
def write_geotiff(tmp_path):
    """Function from pixels (band, y, x) to the path of a GeoTIFF; options as for `write_raster`."""
    return lambda values, **options: write_raster(tmp_path / "scene.tif", values, **options)
