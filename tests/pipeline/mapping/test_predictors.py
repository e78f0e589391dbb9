"""An ensemble maps a tile with the same features, in the same order, as its head was trained on."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch

from cache.reader import FeatureStore
from cache.writer import Writer
from pipeline.backbones import get_spec
from pipeline.backbones.preprocessing import make_preprocessor
from pipeline.config import BackboneConfig, HeadsConfig, LinearHeadConfig, UPerNetHeadConfig
from pipeline.data.image_store import open_images
from pipeline.errors import UserError
from pipeline.extraction import engine, estimate
from pipeline.heads import checkpoint
from pipeline.mapping import torch_predictors
from pipeline.mapping.predict_scene import predict_scene
from pipeline.mapping.predictors import METADATA_KEY, load_onnx_student, parse_signature
from pipeline.mapping.scene import match_scene_bands, open_scene
from pipeline.mapping.torch_predictors import EnsemblePaths, load_ensemble
from pipeline.training import task_data
from pipeline.training.loop import HParams
from pipeline.training.protocol import train_heads, trained_head
from tests.errors import raises

BACKBONES = {
    "raw": BackboneConfig("band_statistics", "mean_std", "none", 64),
    "lite0_random": BackboneConfig("efficientnet", "lite0", "random", 64),
}
HEADS = HeadsConfig(
    LinearHeadConfig("all", "mean", steps=30, batch=20), UPerNetHeadConfig(channels=4, steps=6, batch=4)
)
METADATA = {
    "task": "segmentation",
    "classes": ["a", "b"],
    "bands": [{"name": "B02", "common_name": "blue", "wavelength": 0.492}],
    "units": "dn",
    "gsd": None,
    "size": [32, 32],
}

pytestmark = pytest.mark.xdist_group("ensemble")


def train_head(path, stores, images_path):
    """Train a head on feature stores and write it to a file."""
    data = task_data.load(dict.fromkeys(stores), images_path, HEADS, ("train", "val", "test"), "cpu")
    group = train_heads(data, [HParams(1e-2, 1e-3, 0)])
    checkpoint.save(path, trained_head(data, "+".join(store.stem for store in stores), group, 0))
    return path


@pytest.fixture(scope="module")
def trained_ensemble(images_path, params, make_encoder, tmp_path_factory):
    """params.yaml with two backbones, and the folder of their feature stores, weights and trained head."""
    folder, images = tmp_path_factory.mktemp("ensemble"), open_images(images_path("sample-landuse-seg"))
    extract = dataclasses.replace(params.extract, dtype="float32", shard=16)
    params = dataclasses.replace(params, backbones={**params.backbones, **BACKBONES}, extract=extract)
    stores = []
    for name, backbone in BACKBONES.items():
        spec, weights = get_spec(backbone), {"weights": backbone.weights}
        encoder = make_encoder(images, backbone.family, backbone.variant, 64, weights=backbone.weights)
        schema = engine.make_schema(images, spec, estimate.dry_run(images, encoder, 4).pyramid, 64, extract)
        provenance = engine.provenance(images, name, backbone, spec, encoder.preprocessor, weights, extract, "cpu")
        stores.append(folder / f"features/{name}.zarr")
        writer = Writer(folder / "scratch", schema, stores[-1], provenance)
        engine.extract(images, encoder, writer, 16)
        writer.finish()
        (folder / "weights" / name).mkdir(parents=True)
        (folder / "weights" / name / "source.json").write_text(json.dumps(weights))
    train_head(folder / "head.pt", stores, images_path("sample-landuse-seg"))
    return params, folder


@pytest.fixture
def ensemble(trained_ensemble, images_path, tmp_path):
    """params.yaml with two backbones, and the paths of a copy of their ensemble, which tests may change."""
    params, folder = trained_ensemble
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    images = images_path("sample-landuse-seg")
    return params, EnsemblePaths(tmp_path / "head.pt", images, tmp_path / "features", tmp_path / "weights")


def test_load_ensemble_logits_equal_those_of_the_stored_features(ensemble):
    params, paths = ensemble
    model, head, images = load_ensemble(params, paths, "cpu"), checkpoint.load(paths.head), open_images(paths.images)
    rows = np.array([3, 0, 5])
    features = []
    for backbone, array_names in zip(head.backbones, head.array_names, strict=True):
        store = FeatureStore(paths.features / f"{backbone}.zarr")
        features.append({name: torch.from_numpy(store.read(name, rows)).float() for name in array_names})
    expected = head.logits(features).detach().numpy()
    image_bands = images.band.values.tolist()
    band_indices = [image_bands.index(band.common_name) for band in model.signature.bands]
    chips = images.image[rows].values[:, band_indices].astype(np.float32)
    actual = model.predict_logits(chips, {})
    assert actual.shape == expected.shape == (3, 7, 128, 128)
    np.testing.assert_allclose(actual, expected, atol=1e-3 * expected.std())
    reversed_bands = model.predict_logits(chips[:, ::-1].copy(), {})
    assert not np.allclose(actual, reversed_bands, atol=1e-2 * expected.std())


def test_load_ensemble_needs_only_the_bands_of_its_backbones(ensemble, tmp_path):
    params, paths = ensemble
    assert checkpoint.load(paths.head).backbones == ["raw", "lite0_random"]
    head = train_head(tmp_path / "lite0.pt", [paths.features / "lite0_random.zarr"], paths.images)
    model = load_ensemble(params, dataclasses.replace(paths, head=head), "cpu")
    assert [band.common_name for band in model.signature.bands] == ["blue", "green", "red"]
    chip = open_images(paths.images).image[0].values
    with rasterio.open(
        tmp_path / "s.tif", "w", driver="GTiff", height=128, width=128, count=3, dtype="uint16", crs="EPSG:32633",
        transform=rasterio.Affine(10, 0, 4e5, 0, -10, 58e5),
    ) as file:  # fmt: skip
        file.write(chip[[3, 2, 1]])
        file.descriptions = ["red", "green", "blue"]
        file.update_tags(units="dn")
    scene = open_scene(tmp_path / "s.tif")
    assert match_scene_bands(scene, model.signature) == [2, 1, 0]
    predict_scene(scene, model, tmp_path / "map")
    expected = model.predict_logits(chip[None, [1, 2, 3]].astype(np.float32), {})[0].argmax(axis=0)
    with rasterio.open(tmp_path / "map/class.tif") as file:
        assert (file.read(1) == expected).mean() > 0.999


def test_metadata_tensors_equal_those_of_extraction(images_path):
    images = open_images(images_path("sample-landuse"))
    preprocessor = dataclasses.replace(
        make_preprocessor(images, "raw", BACKBONES["raw"], get_spec(BACKBONES["raw"])),
        metadata_keys=("location", "time"),
    )
    encoder = SimpleNamespace(preprocessor=preprocessor, device="cpu")
    metadata = {"location": np.stack([images.lat[:3], images.lon[:3]], axis=1), "time": images.time[:3].values}
    actual = torch_predictors._metadata_tensors(encoder, metadata)
    expected = preprocessor.metadata(images, slice(0, 3))
    assert set(actual) == set(expected) == {"location", "time"}
    for name, values in expected.items():
        np.testing.assert_array_equal(actual[name].numpy(), values)
    assert actual["time"][0, 0].tolist() == [2017, 46]  # 16 February, from 0


def test_load_ensemble_backbone_with_another_input_size_is_refused(ensemble):
    params, paths = ensemble
    larger = dataclasses.replace(BACKBONES["lite0_random"], input_size=96)
    params = dataclasses.replace(params, backbones={**params.backbones, "lite0_random": larger})
    with raises(UserError, key="backbones.lite0_random", path=paths.features / "lite0_random.zarr"):
        load_ensemble(params, paths, "cpu")


def test_load_ensemble_backbone_with_another_normalisation_is_refused(ensemble):
    params, paths = ensemble
    normalised = dataclasses.replace(BACKBONES["lite0_random"], normalisation="dataset")
    params = dataclasses.replace(params, backbones={**params.backbones, "lite0_random": normalised})
    with raises(UserError, key="backbones.lite0_random"):
        load_ensemble(params, paths, "cpu")


def test_load_ensemble_without_weights_or_head_is_refused(ensemble, tmp_path):
    params, paths = ensemble
    (paths.weights / "raw/source.json").unlink()
    with raises(UserError, "fetch_weights@raw", value="raw", path=paths.weights / "raw"):
        load_ensemble(params, paths, "cpu")
    missing = tmp_path / "none.pt"
    with raises(UserError, path=missing):
        load_ensemble(params, dataclasses.replace(paths, head=missing), "cpu")


@pytest.mark.parametrize("key", METADATA)
def test_parse_signature_missing_key_is_refused(key):
    assert np.isnan(parse_signature(METADATA, "student.json").gsd)
    metadata = {other: value for other, value in METADATA.items() if other != key}
    with raises(UserError, key=key, path="student.json"):
        parse_signature(metadata, "student.json")


@pytest.mark.parametrize(
    ("key", "value"), [("size", [32]), ("task", "regression"), ("task", ["segmentation"]), ("bands", 3)]
)
def test_parse_signature_invalid_value_is_refused(key, value):
    with raises(UserError):
        parse_signature(METADATA | {key: value}, "student.json")


def test_load_onnx_student_missing_or_damaged_file_is_refused(tmp_path):
    path = tmp_path / "student.onnx"
    with raises(UserError, path=path):
        load_onnx_student(path)
    path.write_bytes(b"not ONNX")
    with raises(UserError, path=path):
        load_onnx_student(path)


def test_load_onnx_student_without_metadata_is_refused(linear_model):
    path = linear_model(16, metadata_key="another_key")
    with raises(UserError, key=METADATA_KEY, path=path):
        load_onnx_student(path)
