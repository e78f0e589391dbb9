"""An ensemble maps a tile as its head was trained: the same features, in the same order, from other pixels."""

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
from pipeline.backbones import get_spec, preprocessing
from pipeline.config import BackboneConfig, HeadsConfig, LinearHeadConfig, UPerNetHeadConfig
from pipeline.data import image_store
from pipeline.errors import UserError
from pipeline.extraction import engine, estimate
from pipeline.heads import checkpoint
from pipeline.mapping import predict_scene
from pipeline.mapping import predictors as ensembles
from pipeline.mapping.open_scene import open_scene
from pipeline.mapping.scene import match_scene_bands as bands_at
from pipeline.mapping.torch_predictors import EnsemblePaths, load_ensemble
from pipeline.training import task_data
from pipeline.training.head_trainer import HParams
from pipeline.training.protocol import train_heads, trained_head

MEMBERS = {
    "raw": BackboneConfig("raw", "mean_std", "none", 64),
    "lite0_random": BackboneConfig("efficientnet", "lite0", "random", 64),
}
HEADS = HeadsConfig(
    LinearHeadConfig("all", "mean", steps=30, batch=20), UPerNetHeadConfig(channels=4, steps=6, batch=4)
)


pytestmark = pytest.mark.xdist_group("ensemble")


@pytest.fixture(scope="module")
def made(images_path, params, make_encoder, tmp_path_factory):
    """Two members' stores of the real land use masks, and a head trained on them."""
    path, tmp_path = images_path("sample-landuse-seg"), tmp_path_factory.mktemp("ensemble")
    opened = image_store.open_images(path)
    params = dataclasses.replace(params, backbones={**params.backbones, **MEMBERS})
    extracting = dataclasses.replace(params.extract, dtype="float32", shard=16)
    (tmp_path / "weights").mkdir()
    for name, one in MEMBERS.items():
        encoder = make_encoder(opened, one.family, one.variant, 64, weights=one.weights)
        given = encoder.inputs
        look = estimate.dry_run(opened, encoder, 4)
        layout = engine.make_schema(opened, get_spec(one), look.pyramid, 64, extracting)
        told = engine.provenance(opened, name, one, get_spec(one), given, {"weights": one.weights}, extracting, "cpu")
        writer = Writer(tmp_path / "scratch", layout, tmp_path / f"features/{name}.zarr", told)
        engine.extract(opened, encoder, writer, 16)
        writer.finish()
        (tmp_path / "weights" / name).mkdir()
        (tmp_path / "weights" / name / "source.json").write_text(json.dumps({"weights": one.weights}))
    stores = {tmp_path / f"features/{name}.zarr": None for name in MEMBERS}
    cell = task_data.load(stores, path, HEADS, ("train", "val", "test"), "cpu")
    group = train_heads(cell, [HParams(1e-2, 1e-3, 0)])
    checkpoint.save(tmp_path / "head.pt", trained_head(cell, "+".join(MEMBERS), group, 0))
    return params, opened, tmp_path


@pytest.fixture
def parts(made, tmp_path):
    """A copy of them, to be spoilt."""
    described, opened, folder = made
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return described, EnsemblePaths(tmp_path / "head.pt", opened, tmp_path / "features", tmp_path / "weights")


def test_logits_of_chips_are_those_of_the_stored_features(parts, tmp_path, raw_folder):
    described, places = parts
    one = load_ensemble(described, places, "cpu")
    head = checkpoint.load(places.head)
    rows = np.array([3, 0, 5])
    stored = [
        {
            name: torch.from_numpy(FeatureStore(places.features / f"{member}.zarr").read(name, rows)).float()
            for name in names
        }
        for member, names in zip(head.backbones, head.array_names, strict=True)
    ]
    wanted = head.logits(stored).detach().numpy()
    names = places.images.band.values.tolist()
    chosen = [names.index(band.common_name) for band in one.signature.bands]
    chips = places.images.image[rows].values[:, chosen].astype(np.float32)
    given = one.predict_logits(chips, {})
    assert given.shape == wanted.shape == (3, 7, 128, 128)
    np.testing.assert_allclose(given, wanted, atol=1e-3 * wanted.std())
    assert not np.allclose(given, one.predict_logits(chips[:, ::-1].copy(), {}), atol=1e-2 * wanted.std())


def test_only_bands_that_a_member_sees_are_needed(parts, tmp_path, images_path):
    described, places = parts
    head = checkpoint.load(places.head)
    assert head.backbones == ["raw", "lite0_random"]
    alone = dataclasses.replace(places, head=_alone(parts, images_path, tmp_path))
    one = load_ensemble(described, alone, "cpu")
    assert [band.common_name for band in one.signature.bands] == ["blue", "green", "red"]
    chip = places.images.image[0].values
    with rasterio.open(
        tmp_path / "s.tif", "w", driver="GTiff", height=128, width=128, count=3, dtype="uint16", crs="EPSG:32633",
        transform=rasterio.Affine(10, 0, 4e5, 0, -10, 58e5),
    ) as file:  # fmt: skip
        file.write(chip[[3, 2, 1]])
        file.descriptions = ["red", "green", "blue"]
        file.update_tags(units="dn")
    scene = open_scene(tmp_path / "s.tif")
    assert bands_at(scene, one.signature) == [2, 1, 0]
    predict_scene.predict_scene(scene, one, tmp_path / "map")
    wanted = one.predict_logits(chip[None, [1, 2, 3]].astype(np.float32), {})[0].argmax(axis=0)
    with rasterio.open(tmp_path / "map/class.tif") as file:
        assert (file.read(1) == wanted).mean() > 0.999


def _alone(parts, store, folder):
    _, places = parts
    cell = task_data.load({places.features / "lite0_random.zarr": None}, store("sample-landuse-seg"), HEADS,
                      ("train", "val", "test"), "cpu")  # fmt: skip
    checkpoint.save(folder / "alone.pt", trained_head(cell, "lite0_random", train_heads(cell, [HParams(1e-2, 1e-3, 0)]), 0))
    return folder / "alone.pt"


def test_where_and_when_are_told_as_extraction_tells_them(images_path):
    opened = image_store.open_images(images_path("sample-landuse"))
    given = dataclasses.replace(
        preprocessing.make_preprocessor(opened, "raw", MEMBERS["raw"], get_spec(MEMBERS["raw"])),
        context=("place", "time"),
    )
    known = {"place": np.stack([opened.lat[:3], opened.lon[:3]], axis=1), "time": opened.time[:3].values}
    told = ensembles._told(SimpleNamespace(inputs=given, device="cpu"), known)
    wanted = given.metadata(opened, slice(0, 3))
    assert set(told) == set(wanted) == {"place", "time"}
    for name, values in wanted.items():
        np.testing.assert_array_equal(told[name].numpy(), values)
    assert told["time"][0, 0].tolist() == [2017, 46]  # 16 February, from 0


def test_a_backbone_that_was_described_otherwise(parts):
    described, places = parts
    larger = dataclasses.replace(MEMBERS["lite0_random"], input_size=96)
    described = dataclasses.replace(described, backbones={**described.backbones, "lite0_random": larger})
    with pytest.raises(UserError, match="describes lite0_random otherwise than when"):
        load_ensemble(described, places, "cpu")


def test_no_weights_and_no_head(parts, tmp_path):
    described, places = parts
    (places.weights / "raw/source.json").unlink()
    with pytest.raises(UserError, match="fetch_weights@raw"):
        load_ensemble(described, places, "cpu")
    with pytest.raises(UserError, match="no trained head"):
        load_ensemble(described, dataclasses.replace(places, head=tmp_path / "none.pt"), "cpu")
