import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import rasterio

from pipeline.data.sources import osm_landuse
from pipeline.errors import UserError
from pipeline.mapping import blend, predict_scene
from pipeline.mapping.predictors import load_onnx_student
from pipeline.mapping.open_scene import open_scene
from pipeline.mapping.predictors import class_probabilities
from pipeline.mapping.tiling import output_blocks
from tests.conftest import ROOT
from tests.pipeline.mapping.conftest import BANDS, BIAS, WEIGHT

PLACES = [osm_landuse.BANDS.index(band) for band in BANDS]


def whole(image):
    """Class and probability of every pixel, computed from the whole scene at once."""
    logits = np.tensordot(WEIGHT, image[PLACES].astype(np.float32), axes=1) + BIAS[:, None, None]
    given = class_probabilities(logits[None], "segmentation")[0]
    return given.argmax(axis=0), given.max(axis=0), np.sort(given, axis=0)


@pytest.fixture
def geotiff(tmp_path):
    """From pixels (band, y, x) to a GeoTIFF that names its bands and units."""

    def write(values, name="scene.tif", units="dn", names=None, nodata=None, transform=None, crs="EPSG:32633"):
        path = tmp_path / name
        with rasterio.open(
            path, "w", driver="GTiff", height=values.shape[1], width=values.shape[2], count=len(values),
            dtype=values.dtype, nodata=nodata, crs=crs,
            transform=transform or rasterio.Affine(10, 0, 400000, 0, -10, 5800000),
        ) as file:  # fmt: skip
            file.write(values)
            file.descriptions = names or [band.common_name for band in BANDS]
            file.update_tags(units=units)
        return path

    return write


def read(folder, name):
    with rasterio.open(folder / f"{name}.tif") as file:
        return file.read(), file.profile, file.tags()


def test_a_map_of_the_real_scene_is_that_of_the_whole_scene_at_once(landuse_scene, raw_folder, linear, tmp_path):
    image, transform, crs = osm_landuse.read_scene(raw_folder("osm_landuse"))
    told = predict_scene.predict_scene(landuse_scene, load_onnx_student(linear(32)), tmp_path / "map")
    wanted, sure, ranked = whole(image)
    classes, profile, tags = read(tmp_path / "map", "class")
    percent, other, _ = read(tmp_path / "map", "confidence")
    clear = ranked[-1] - ranked[-2] > 1e-4  # not equal but for rounding
    assert clear.mean() > 0.98
    assert (classes[0] == wanted)[clear].all()
    assert np.abs(percent[0] - 100 * sure).max() <= 0.51
    assert np.bincount(wanted.ravel(), minlength=3).min() > 0.02 * wanted.size, "a map of one class shows nothing"
    for one in (profile, other):
        assert one["transform"] == transform
        assert one["crs"] == crs
        assert (one["height"], one["width"], one["dtype"], one["nodata"]) == (768, 1536, "uint8", 255)
    assert tags["classes"] == "a, b, c"
    shares = np.bincount(wanted.ravel(), minlength=3) / wanted.size
    np.testing.assert_allclose(told["shares"], shares, atol=1e-3)
    assert json.loads((tmp_path / "map/map.json").read_text()) == told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linear32.onnx", "map"]


def test_a_map_is_a_cloud_optimized_geotiff(landuse_scene, linear, tmp_path):
    predict_scene.predict_scene(landuse_scene, load_onnx_student(linear(32)), tmp_path / "map")
    for name in ("class", "confidence"):
        with rasterio.open(tmp_path / f"map/{name}.tif") as file:
            assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert file.block_shapes == [(512, 512)]
            assert file.overviews(1) == [2, 4]
            assert file.scales == ((1.0,) if name == "class" else (0.01,))


def test_rows_and_columns_are_not_swapped(geotiff, linear, tmp_path):
    values = np.full((3, 40, 100), 1000, np.uint16)
    values[0, 3, 70] = 5000  # blue: class a
    values[1, 30, 5] = 5000  # nir: class b
    predict_scene.predict_scene(open_scene(geotiff(values)), load_onnx_student(linear(32)), tmp_path / "map")
    classes, profile, _ = read(tmp_path / "map", "class")
    background = classes[0, 0, 0]
    assert np.argwhere(classes[0] != background).tolist() == [
        list(place) for place, name in (((3, 70), 0), ((30, 5), 1)) if name != background
    ]
    assert classes[0, 3, 70] == 0
    assert classes[0, 30, 5] == 1
    assert profile["transform"] == rasterio.Affine(10, 0, 400000, 0, -10, 5800000)


def test_a_model_is_told_latitude_and_longitude_of_its_tiles(geotiff, linear, tmp_path):
    seen = []
    one = load_onnx_student(linear(32))

    def logits(chips, known):
        seen.append(known["place"])
        return one.predict_logits(chips, known)

    transform = rasterio.Affine(0.0001, 0, 13.0, 0, -0.0001, 52.0)
    values = np.full((3, 32, 96), 1000, np.uint16)
    path = geotiff(values, crs="EPSG:4326", transform=transform)
    predict_scene.predict_scene(open_scene(path), make_predictor(one, logits), tmp_path / "map")
    centres = np.concatenate(seen)
    np.testing.assert_allclose(centres[:, 0], 52 - 0.0016, atol=1e-5)
    np.testing.assert_allclose(centres[0, 1], 13 + 0.0016, atol=1e-5)
    assert (np.diff(centres[:, 1]) > 0).all()


def make_predictor(one, logits):
    return type(one)(one.name, one.digest, one.signature, logits)


def test_no_data_is_kept_and_does_not_spread(geotiff, linear, tmp_path, raw_folder):
    image = osm_landuse.read_scene(raw_folder("osm_landuse"))[0][PLACES, :200, :300].copy()
    hole = np.zeros((200, 300), bool)
    hole[50:150, 100:220] = True
    hole[:, 290:] = True
    image[:, hole] = 0
    predict_scene.predict_scene(open_scene(geotiff(image, nodata=0)), load_onnx_student(linear(32)), tmp_path / "map")
    classes, percent = read(tmp_path / "map", "class")[0][0], read(tmp_path / "map", "confidence")[0][0]
    assert ((classes == 255) == hole).all()
    assert ((percent == 255) == hole).all()
    full = np.zeros((13, 200, 300), np.uint16)
    full[PLACES] = image
    wanted, _, ranked = whole(full)
    clear = ~hole & (ranked[-1] - ranked[-2] > 1e-4)
    assert (classes == wanted)[clear].all()


def test_one_band_without_data_is_no_data(geotiff, linear, tmp_path):
    values = np.full((3, 40, 40), 1000.0, np.float32)
    values[1, 7, 9] = np.nan
    predict_scene.predict_scene(open_scene(geotiff(values)), load_onnx_student(linear(32)), tmp_path / "map")
    assert np.argwhere(read(tmp_path / "map", "class")[0][0] == 255).tolist() == [[7, 9]]


def test_a_scene_smaller_than_a_tile(geotiff, linear, tmp_path, raw_folder):
    image = osm_landuse.read_scene(raw_folder("osm_landuse"))[0][:, :13, :21]
    predict_scene.predict_scene(open_scene(geotiff(image[PLACES])), load_onnx_student(linear(32)), tmp_path / "map")
    wanted, _, ranked = whole(image)
    classes = read(tmp_path / "map", "class")[0][0]
    assert (classes == wanted)[ranked[-1] - ranked[-2] > 1e-4].all()


def test_chips_with_one_class_are_mapped_where_they_lie(geotiff, linear, tmp_path):
    """Two halves: far from their border every pixel has the class of the chips around it."""
    values = np.zeros((3, 64, 128), np.uint16)
    values[0, :, :64], values[1, :, 64:] = 3000, 3000
    predict_scene.predict_scene(open_scene(geotiff(values)), load_onnx_student(linear(16, task="classification")), tmp_path / "map")
    classes, percent = read(tmp_path / "map", "class")[0][0], read(tmp_path / "map", "confidence")[0][0]
    assert (classes[:, :56] == 0).all()
    assert (classes[:, 72:] == 1).all()
    assert percent[:, 64].max() < percent[:, 20].min()


def test_several_labels_have_a_band_each(geotiff, linear, tmp_path):
    values = np.full((3, 40, 40), 1000, np.uint16)
    values[0] = 5000
    told = predict_scene.predict_scene(open_scene(geotiff(values)), load_onnx_student(linear(16, task="multilabel")), tmp_path / "map")
    classes, percent = read(tmp_path / "map", "class")[0], read(tmp_path / "map", "confidence")[0]
    logits = WEIGHT @ np.array([5000, 1000, 1000]) + BIAS
    assert classes.shape == (3, 40, 40)
    assert (classes == (logits > 0)[:, None, None]).all()
    assert np.abs(percent - 100 / (1 + np.exp(-logits))[:, None, None]).max() <= 0.51
    assert told["shares"] == (logits > 0).astype(float).tolist()


def test_a_missing_band_other_units_and_pixels_of_another_size(geotiff, linear, tmp_path):
    values, model = np.full((3, 40, 40), 1000, np.uint16), load_onnx_student(linear(32))
    cases = [
        ({"names": ["blue", "nir", "red"]}, ["lacks the bands swir16", "it has blue, nir, red"]),
        ({"units": "reflectance"}, ["is in 'reflectance'", "trained on 'dn'"]),
        ({"transform": rasterio.Affine(30, 0, 4e5, 0, -30, 58e5)}, ["pixels of 30", "trained on 10 m"]),
    ]
    for number, (changes, words) in enumerate(cases):
        with pytest.raises(UserError) as error:
            predict_scene.predict_scene(open_scene(geotiff(values, f"{number}.tif", **changes)), model, tmp_path / "map")
        assert all(word in str(error.value) for word in words), error.value
        assert not (tmp_path / "map").exists()
    assert not list(tmp_path.glob(".*"))


def test_bands_are_found_by_name_wherever_they_are(geotiff, linear, tmp_path, raw_folder):
    image = osm_landuse.read_scene(raw_folder("osm_landuse"))[0][:, :40, :50]
    turned = image[[PLACES[2], PLACES[0], PLACES[1]]]
    predict_scene.predict_scene(
        open_scene(geotiff(turned, names=["swir16", "blue", "nir"])), load_onnx_student(linear(32)), tmp_path / "map"
    )
    wanted, _, ranked = whole(image)
    assert (read(tmp_path / "map", "class")[0][0] == wanted)[ranked[-1] - ranked[-2] > 1e-4].all()


def test_a_folder_that_is_no_map_is_left_alone(geotiff, linear, tmp_path):
    (tmp_path / "map").mkdir()
    (tmp_path / "map/mine").touch()
    scene = open_scene(geotiff(np.full((3, 40, 40), 1000, np.uint16)))
    with pytest.raises(UserError, match="is no map"):
        predict_scene.predict_scene(scene, load_onnx_student(linear(32)), tmp_path / "map")
    assert (tmp_path / "map/mine").exists()


def command(scene, model, out):
    return [sys.executable, "-m", "stages.map", "--scene", str(scene), "--onnx", str(model), "--out", str(out)]


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(geotiff, linear, tmp_path, raw_folder):
    image = osm_landuse.read_scene(raw_folder("osm_landuse"))[0][PLACES]
    scene, model = geotiff(image), linear(16)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command(scene, model, "unbroken"), cwd=tmp_path, env=environment, check=True, capture_output=True)
    with subprocess.Popen(
        command(scene, model, "killed"), cwd=tmp_path, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as running:  # fmt: skip
        until = time.monotonic() + 60
        while len(blocks := list(tmp_path.glob(".killed.partial/*/r*c??????"))) < 2:
            assert running.poll() is None
            assert time.monotonic() < until
            time.sleep(0.002)
        os.killpg(running.pid, signal.SIGKILL)
    assert not (tmp_path / "killed").exists()
    left = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".killed.partial/*/r*c??????")}
    assert len(blocks) <= len(left) < 6

    again = subprocess.Popen(
        command(scene, model, "killed"), cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    kept = set()
    while again.poll() is None:
        kept |= {path for path, at in left.items() if path.exists() and path.stat().st_mtime_ns != at}
        time.sleep(0.005)
    assert again.returncode == 0, again.stdout.read()
    assert not kept, "a finished block was made again"
    for name in ("class.tif", "confidence.tif", "map.json"):
        assert (tmp_path / "unbroken" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert not list(tmp_path.glob(".*.partial"))


def test_what_another_model_left_is_not_used(geotiff, linear, tmp_path, monkeypatch):
    scene = open_scene(geotiff(np.full((3, 40, 40), 1000, np.uint16)))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(predict_scene, "_publish", full)
        with pytest.raises(OSError, match="No space"):
            predict_scene.predict_scene(scene, load_onnx_student(linear(32)), tmp_path / "map")
    (old,) = tmp_path.glob(".map.partial/*")
    (block,) = old.iterdir()
    block.write_bytes(b"\x01" * block.stat().st_size)  # what the first model would have left
    predict_scene.predict_scene(scene, load_onnx_student(linear(16)), tmp_path / "map")
    assert (read(tmp_path / "map", "class")[0] != 1).all()
    assert not old.exists()


def test_a_block_is_read_by_parts(landuse_scene, linear, monkeypatch):
    asked = []
    landuse_scene = type(landuse_scene)(**{
        **vars(landuse_scene),
        "read": lambda window, places, inner=landuse_scene.read: asked.append(window) or inner(window, places),
    })  # fmt: skip
    made = predict_scene.plan_mapping(landuse_scene, load_onnx_student(linear(32)))
    blend.predict_block(made, next(output_blocks(made.y_tiles, made.x_tiles)), lambda _: None)
    assert max(height for _, _, height, _ in asked) == blend.READ_ROWS
    assert len(asked) == 2
    assert max(width for *_, width in asked) <= 512 + 2 * 32
