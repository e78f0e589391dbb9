import dataclasses
import gc
import json
import multiprocessing
import signal
import time

import numpy as np
import pytest
import rasterio

from pipeline.data.sources import osm_landuse
from pipeline.errors import UserError
from pipeline.mapping import predict_scene, tiling
from pipeline.mapping.predictors import load_onnx_student
from pipeline.mapping.scene import open_scene
from pipeline.tasks import Segmentation
from tests.errors import raises
from tests.pipeline.mapping.conftest import BANDS, BIAS, GRID, WEIGHT


def predict_whole(image):
    """Class and probability of every pixel of a scene, and where the two best differ clearly."""
    logits = np.tensordot(WEIGHT, image.astype(np.float32), axes=1) + BIAS[:, None, None]
    probabilities = Segmentation.probabilities(logits[None])[0]
    *_, second, first = np.sort(probabilities, axis=0)
    return probabilities.argmax(axis=0), first, first - second > 1e-4


def read_map(folder, name):
    with rasterio.open(folder / f"{name}.tif") as file:
        return file.read()


@pytest.fixture
def map_pixels(write_geotiff, linear_model, tmp_path):
    """Function from pixels to map.json's content, classes and confidence; maps to tmp_path/map."""

    def write_and_map(pixels, tile=32, task="segmentation", **options):
        scene, model = open_scene(write_geotiff(pixels, **options)), load_onnx_student(linear_model(tile, task=task))
        metadata = predict_scene.predict_scene(scene, model, tmp_path / "map")
        return metadata, *(read_map(tmp_path / "map", name) for name in ("class", "confidence"))

    return write_and_map


@pytest.fixture(scope="session")
def landuse_image(raw_folder):
    """Pixels (band, y, x) of the Sentinel-2 scene, of `BANDS`."""
    return osm_landuse.read_scene(raw_folder("osm_landuse"))[0][[osm_landuse.BANDS.index(band) for band in BANDS]]


def test_predict_scene_equals_a_prediction_of_the_whole_scene(landuse_image, map_pixels, tmp_path):
    image = landuse_image[:, :560, :700]  # four blocks
    metadata, classes, percent = map_pixels(image)
    expected, probability, is_unambiguous = predict_whole(image)
    assert is_unambiguous.mean() > 0.98
    assert (classes[0] == expected)[is_unambiguous].all()
    assert np.abs(percent[0] - 100 * probability).max() <= 0.51
    n_pixels = np.bincount(expected.ravel(), minlength=3)
    assert n_pixels.min() > 0.02 * expected.size, "a map of one class would prove nothing"
    for name in ("class", "confidence"):
        with rasterio.open(tmp_path / f"map/{name}.tif") as file:
            assert (file.transform, file.crs) == (GRID, rasterio.CRS.from_epsg(32633))
            assert (file.shape, file.dtypes, file.nodata) == ((560, 700), ("uint8",), 255)
            assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert file.block_shapes == [(512, 512)]
            assert file.overviews(1) == [2]
            assert file.scales == ((1.0,) if name == "class" else (0.01,))
            assert file.tags()["classes"] == "a, b, c"
    np.testing.assert_allclose(metadata["class_shares"], n_pixels / expected.size, atol=1e-3)
    assert json.loads((tmp_path / "map/map.json").read_text()) == metadata
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linear32.onnx", "map", "scene.tif"]


def test_predict_scene_gives_the_model_latitude_and_longitude_of_its_tiles(write_geotiff, linear_model, tmp_path):
    locations, onnx_model = [], load_onnx_student(linear_model(32))

    def predict_logits(chips, metadata):
        locations.append(metadata["location"])
        return onnx_model.predict_logits(chips, metadata)

    transform = rasterio.Affine(0.0001, 0, 13.0, 0, -0.0001, 52.0)
    path = write_geotiff(np.full((3, 32, 96), 1000, np.uint16), crs="EPSG:4326", transform=transform)
    model = dataclasses.replace(onnx_model, predict_logits=predict_logits)
    predict_scene.predict_scene(open_scene(path), model, tmp_path / "map")
    centres = np.concatenate(locations)
    np.testing.assert_allclose(centres[:, 0], 52 - 0.0016, atol=1e-5)
    np.testing.assert_allclose(centres[0, 1], 13 + 0.0016, atol=1e-5)
    assert (np.diff(centres[:, 1]) > 0).all()


def test_predict_scene_nodata_does_not_spread(map_pixels, landuse_image):
    image = landuse_image[:, :100, :150].astype(np.float32)
    is_hole = np.zeros((100, 150), bool)
    is_hole[25:75, 50:110] = True
    is_hole[:, 140:] = True
    image[:, is_hole] = 0
    image[1, 7, 9], is_hole[7, 9] = np.nan, True  # without data in one band
    _, classes, percent = map_pixels(image, nodata=0)
    assert ((classes[0] == 255) == is_hole).all()
    assert ((percent[0] == 255) == is_hole).all()
    expected, _, is_unambiguous = predict_whole(image)
    assert (classes[0] == expected)[~is_hole & is_unambiguous].all()


@pytest.mark.parametrize("height", [13, 40])
def test_predict_scene_smaller_than_a_tile_with_bands_in_another_order(map_pixels, landuse_image, height):
    image = landuse_image[:, :height, :21]
    _, classes, _ = map_pixels(image[[2, 0, 1]], band_names=["swir16", "blue", "nir"])
    expected, _, is_unambiguous = predict_whole(image)
    assert (classes[0] == expected)[is_unambiguous].all()


def test_predict_scene_classification_locates_classes(map_pixels):
    """The image has two halves. Away from their border every pixel has the class of the tiles around it."""
    values = np.zeros((3, 64, 128), np.uint16)
    values[0, :, :64], values[1, :, 64:] = 3000, 3000
    _, classes, percent = map_pixels(values, 16, "classification")
    assert (classes[..., :56] == 0).all()
    assert (classes[..., 72:] == 1).all()
    assert percent[..., 64].max() < percent[..., 20].min()


def test_predict_scene_multilabel_has_a_band_per_class(map_pixels):
    values = np.full((3, 40, 40), 1000, np.uint16)
    values[0] = 5000
    metadata, classes, percent = map_pixels(values, 16, "multilabel")
    logits = WEIGHT @ np.array([5000, 1000, 1000]) + BIAS
    assert classes.shape == (3, 40, 40)
    assert (classes == (logits > 0)[:, None, None]).all()
    assert np.abs(percent - 100 / (1 + np.exp(-logits))[:, None, None]).max() <= 0.51
    assert metadata["class_shares"] == (logits > 0).astype(float).tolist()


@pytest.mark.parametrize(
    ("changes", "metadata_keys", "fields"),
    [
        ({"band_names": "abc"}, (), {"key": "bands", "value": ["blue", "nir", "swir16"], "allowed": "abc"}),
        ({"units": "reflectance"}, (), {"key": "units", "value": "reflectance", "allowed": ["dn"]}),
        ({"transform": rasterio.Affine(30, 0, 4e5, 0, -30, 58e5)}, (), {"key": "gsd", "allowed": [10.0]}),
        ({"crs": None}, ("location",), {"key": "crs"}),
        ({}, ("time",), {"key": "time"}),
    ],
    ids=["missing bands", "other units", "other pixel size", "no location", "no time"],
)
def test_predict_scene_that_does_not_fit_the_model_is_refused(
    write_geotiff, linear_model, tmp_path, changes, metadata_keys, fields
):
    model, path = load_onnx_student(linear_model(32)), write_geotiff(np.ones((3, 40, 40), np.uint16), **changes)
    model = dataclasses.replace(model, signature=dataclasses.replace(model.signature, metadata_keys=metadata_keys))
    with raises(UserError, path=path, **fields):
        predict_scene.predict_scene(open_scene(path), model, tmp_path / "map")
    assert not (tmp_path / "map").exists()
    assert not list(tmp_path.glob(".*"))


def test_predict_scene_does_not_replace_a_folder_that_is_not_a_map(map_pixels, tmp_path):
    (tmp_path / "map").mkdir()
    (tmp_path / "map/file").touch()
    with raises(UserError, path=tmp_path / "map"):
        map_pixels(np.full((3, 40, 40), 1000, np.uint16))
    assert (tmp_path / "map/file").exists()


def test_predict_scene_killed_run_resumes_and_ends_with_the_same_bytes(
    write_geotiff, linear_model, tmp_path, monkeypatch, landuse_image
):
    scene, model = write_geotiff(landuse_image[:, :, :1024]), linear_model(16)  # four blocks

    def map_to(name):
        return predict_scene.predict_scene(open_scene(scene), load_onnx_student(model), tmp_path / name)

    gc.collect()  # a child that deletes an onnxruntime session of its parent waits for threads that it lacks
    process, deadline = multiprocessing.get_context("fork").Process(target=map_to, args=("killed",)), time.time() + 60
    process.start()
    while process.is_alive() and time.time() < deadline and not list(tmp_path.glob(".killed.partial/*/r*c??????")):
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    n_finished = len(list(tmp_path.glob(".killed.partial/*/r*c??????")))
    assert 1 <= n_finished < 4

    blocks, predict_block = [], tiling.predict_block
    monkeypatch.setattr(tiling, "predict_block", lambda *arguments: blocks.append(1) or predict_block(*arguments))
    map_to("killed"), map_to("complete")
    assert len(blocks) == 4 - n_finished + 4
    for name in ("class.tif", "confidence.tif", "map.json"):
        assert (tmp_path / "complete" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert not list(tmp_path.glob(".*.partial"))


def test_predict_scene_does_not_use_blocks_of_another_model(write_geotiff, linear_model, tmp_path, monkeypatch):
    scene = open_scene(write_geotiff(np.full((3, 40, 40), 1000, np.uint16)))
    models = [load_onnx_student(linear_model(tile)) for tile in (32, 16)]

    def fail_with_full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(predict_scene, "_publish", fail_with_full_disk)
        with raises(OSError, errno=28):
            predict_scene.predict_scene(scene, models[0], tmp_path / "map")
    (stale_folder,) = tmp_path.glob(".map.partial/*")
    (block,) = stale_folder.iterdir()
    block.write_bytes(b"\x01" * block.stat().st_size)
    predict_scene.predict_scene(scene, models[1], tmp_path / "map")
    assert (read_map(tmp_path / "map", "class")[0] != 1).all()
    assert not stale_folder.exists()


def test_blend_window_falls_to_the_edges_and_sums_to_one_at_a_seam():
    window = tiling.blend_window(32, 8)
    assert (np.diff(window[:8]) > 0).all()
    assert (window[8:24] == 1).all()
    assert window[0] < 0.02
    np.testing.assert_allclose(window[-8:] + window[:8], 1, rtol=1e-6)
    np.testing.assert_allclose(tiling.tile_axis(32 + 5 * 24, 32, 8).weight[8:-8], 1, rtol=1e-6)
