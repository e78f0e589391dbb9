import dataclasses
import json
import shutil

import numpy as np
import pytest
import rasterio
import torch

from cache.reader import FeatureStore
from pipeline.config import BackboneConfig
from pipeline.data import image_writer
from pipeline.data.image_store import open_images
from pipeline.errors import UserError
from pipeline.finetuning.model import EnsembleMember
from pipeline.heads import checkpoint
from pipeline.mapping.predict_scene import predict_scene
from pipeline.mapping.predictors import METADATA_KEY, load_onnx_student, parse_signature
from pipeline.mapping.scene import match_scene, open_scene
from pipeline.mapping.torch_predictors import load_ensemble
from pipeline.training import task_data
from pipeline.training.loop import HParams
from pipeline.training.protocol import train_heads, trained_head
from tests.errors import raises
from tests.pipeline.finetuning.conftest import HEADS, N_CLASSES, SIDE, extract_features, make_images
from tests.pipeline.mapping.conftest import write_raster

BACKBONES = {
    "raw": BackboneConfig("band_statistics", "mean_std", "none", 64),
    "lite0_random": BackboneConfig("efficientnet", "lite0", "random", 64),
}
METADATA = {
    "task": "segmentation", "classes": ["a", "b"], "units": "dn", "gsd": None, "size": [32, 32],
    "bands": [{"name": "B02", "common_name": "blue", "wavelength": 0.492}],
}  # fmt: skip

pytestmark = pytest.mark.xdist_group("ensemble")


def train_head(path, stores, images_path):
    data = task_data.load(dict.fromkeys(stores), images_path, HEADS, ("train", "val", "test"), "cpu")
    group = train_heads(data, [HParams(1e-2, 1e-3, 0)])
    checkpoint.save(path, trained_head(data, "+".join(store.stem for store in stores), group, 0))
    return path


@pytest.fixture(scope="module")
def trained_ensemble(params, tmp_path_factory):
    """params.yaml with two backbones, and the folder of their images, features, weights and head."""
    folder = tmp_path_factory.mktemp("ensemble")
    image_writer.write(make_images("segmentation"), folder / "scratch", folder / "images.zarr")
    images, stores = open_images(folder / "images.zarr"), []
    (folder / "features").mkdir()
    for name, backbone in BACKBONES.items():
        stores.append(extract_features(images, EnsembleMember(name, backbone, folder), folder / "features"))
        (folder / "weights" / name).mkdir(parents=True)
        (folder / "weights" / name / "source.json").write_text(json.dumps({"weights": backbone.weights}))
    train_head(folder / "head.pt", stores, folder / "images.zarr")
    return dataclasses.replace(params, backbones={**params.backbones, **BACKBONES}), folder


@pytest.fixture
def load(trained_ensemble, tmp_path):
    """Function from changed backbones, and a head, to the predictor of a copy of the ensemble in tmp_path."""
    params, folder = trained_ensemble
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)

    def load_changed(backbones=(), head="head.pt"):
        changed = dataclasses.replace(params, backbones={**params.backbones, **dict(backbones)})
        return load_ensemble(
            changed, "cpu", head_path=tmp_path / head, images_path=tmp_path / "images.zarr",
            features_dir=tmp_path / "features", weights_dir=tmp_path / "weights",
        )  # fmt: skip

    return load_changed


def chip_metadata(images, rows):
    return {"location": np.stack([images.lat[rows], images.lon[rows]], axis=1), "time": images.time[rows].values}


def test_load_ensemble_logits_equal_those_of_the_stored_features(load, tmp_path):
    model, head, images = load(), checkpoint.load(tmp_path / "head.pt"), open_images(tmp_path / "images.zarr")
    rows = np.array([3, 0, 5])
    features = []
    for backbone, array_names in zip(head.backbones, head.array_names, strict=True):
        store = FeatureStore(tmp_path / f"features/{backbone}.zarr")
        features.append({name: torch.from_numpy(store.read(name, rows)).float() for name in array_names})
    expected = head.logits(features).detach().numpy()
    image_bands = images.band.values.tolist()
    band_indices = [image_bands.index(band.common_name) for band in model.signature.bands]
    chips = images.image[rows].values[:, band_indices].astype(np.float32)
    actual = model.predict_logits(chips, chip_metadata(images, rows))
    assert actual.shape == expected.shape == (3, N_CLASSES, SIDE, SIDE)
    np.testing.assert_allclose(actual, expected, atol=1e-3 * expected.std())
    reversed_bands = model.predict_logits(chips[:, ::-1].copy(), chip_metadata(images, rows))
    assert not np.allclose(actual, reversed_bands, atol=1e-2 * expected.std())


def test_load_ensemble_needs_only_the_bands_of_its_backbones(load, tmp_path):
    images_path = tmp_path / "images.zarr"
    head_path = train_head(tmp_path / "lite0.pt", [tmp_path / "features/lite0_random.zarr"], images_path)
    model, images = load(head=head_path), open_images(images_path)
    assert [band.common_name for band in model.signature.bands] == ["blue", "green", "red"]
    chip = images.image[0].values
    scene = open_scene(write_raster(tmp_path / "s.tif", chip[[3, 2, 1]], ["red", "green", "blue"]))
    assert match_scene(scene, model.signature) == [2, 1, 0]
    predict_scene(scene, model, tmp_path / "map")
    logits = model.predict_logits(chip[None, [1, 2, 3]].astype(np.float32), chip_metadata(images, [0]))[0]
    with rasterio.open(tmp_path / "map/class.tif") as file:
        assert (file.read(1) == logits.argmax(axis=0)).mean() > 0.99


@pytest.mark.parametrize("change", [{"input_size": 96}, {"normalisation": "dataset"}])
def test_load_ensemble_backbone_that_has_changed_since_extraction_is_refused(load, tmp_path, change):
    changed = dataclasses.replace(BACKBONES["lite0_random"], **change)
    with raises(UserError, key="backbones.lite0_random", path=tmp_path / "features/lite0_random.zarr"):
        load({"lite0_random": changed})


def test_load_ensemble_backbone_with_other_wavelengths_than_at_extraction_is_refused(load, tmp_path):
    path = tmp_path / "features/lite0_random.zarr/zarr.json"
    metadata = json.loads(path.read_text())
    metadata["attributes"]["wavelengths_micrometre"][0] += 0.01
    path.write_text(json.dumps(metadata))
    with raises(UserError, key="backbones.lite0_random", path=path.parent):
        load()


def test_load_ensemble_without_weights_or_head_is_refused(load, tmp_path):
    (tmp_path / "weights/raw/source.json").unlink()
    with raises(UserError, "fetch_weights@raw", value="raw", path=tmp_path / "weights/raw"):
        load()
    with raises(UserError, path=tmp_path / "none.pt"):
        load(head="none.pt")


@pytest.mark.parametrize(
    ("key", "value"),
    [*((key, None) for key in METADATA if key != "gsd"), ("size", [32]), ("task", "regression"), ("bands", 3)],
)
def test_parse_signature_missing_key_or_invalid_value_is_refused(key, value):
    assert np.isnan(parse_signature(METADATA, "student.json").gsd)
    metadata = {other: entry for other, entry in METADATA.items() if other != key}
    fields = {"path": "student.json", "key": key} if value is None else {}
    with raises(UserError, **fields):
        parse_signature(metadata if value is None else {**metadata, key: value}, "student.json")


def test_load_onnx_student_file_that_is_not_a_student_is_refused(tmp_path, linear_model):
    path = tmp_path / "student.onnx"
    with raises(UserError, path=path):
        load_onnx_student(path)
    path.write_bytes(b"not ONNX")
    with raises(UserError, path=path):
        load_onnx_student(path)
    path = linear_model(16, metadata_key="another_key")
    with raises(UserError, key=METADATA_KEY, path=path):
        load_onnx_student(path)
