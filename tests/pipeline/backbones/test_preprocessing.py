"""The exact tensors that reach the networks, from the files to the first layer."""

import dataclasses

import numpy as np
import pytest
import torch

from pipeline.backbones import get_spec, preprocessing
from pipeline.bands import MissingBandsError
from pipeline.config import BackboneConfig
from pipeline.data import image_store as images
from pipeline.errors import UserError

DOFA = BackboneConfig("dofa", "dofa_large_patch16_224", "random", 224, normalisation="dataset")
PRITHVI = BackboneConfig("prithvi", "prithvi_eo_v2_300_tl", "random", 224)
PRITHVI_600 = BackboneConfig("prithvi", "prithvi_eo_v2_600_tl", "random", 224)
HIERA = BackboneConfig("hiera", "sam2.1_hiera_l", "random", 224)
CSMASK = BackboneConfig("efficientnet", "csmask_b4", "random", 128)
LITE0 = BackboneConfig("efficientnet", "lite0", "random", 128)


@pytest.fixture
def given(images_path):
    def make(dataset, backbone, **changes):
        opened, backbone = images.open_images(images_path(dataset)), dataclasses.replace(backbone, **changes)
        return preprocessing.make_preprocessor(opened, backbone.variant, backbone, get_spec(backbone)), opened

    return make


def tensor(made, opened, rows=slice(0, 1)):
    return made.tensor(torch.from_numpy(made.select(opened.image[rows].values)))


def test_the_tensor_that_reaches_csmask(given):
    made, opened = given("sample-landuse-seg", CSMASK)
    # Blue first: DN/10000, then the network's own statistics, by hand for one pixel of B02, B08 and B12.
    for position, (band, mean, std) in enumerate(
        [
            ("blue", 0.27552253, 0.24488002),
            ("nir", 0.33431220, 0.23213787),
            ("swir22", 0.15826508, 0.12604216),
        ]
    ):
        value = float(opened.image[0, opened.band.values.tolist().index(band), 40, 50]) / 10000
        found = tensor(made, opened)[0, (0, 3, 5)[position], 40, 50]
        assert found == pytest.approx((value - mean) / std, abs=1e-6)
    assert tensor(made, opened).shape == (1, 6, 128, 128)


def test_prithvi_gets_what_its_authors_divide_by(given):
    """Their mean and standard deviation are of digital numbers, and so is the image."""
    from terratorch.models.backbones.prithvi_vit import PRITHVI_V2_MEAN, PRITHVI_V2_STD

    made, opened = given("sample-landuse-seg", PRITHVI, input_size=128)
    six = opened.image[:1].sel(band=["blue", "green", "red", "nir08", "swir16", "swir22"]).values.astype("float32")
    theirs = (six - np.reshape(PRITHVI_V2_MEAN, (6, 1, 1))) / np.reshape(PRITHVI_V2_STD, (6, 1, 1))
    np.testing.assert_allclose(tensor(made, opened), theirs, atol=1e-4)


def test_golden_tensors_of_one_real_chip(given):
    """Pins the whole way from the file to the network; a change here changes every feature."""
    found = {}
    for dataset, backbone in [
        ("sample-landuse", CSMASK),
        ("sample-landuse", LITE0),
        ("sample-trees", LITE0),
        ("sample-landuse-seg", HIERA),
        ("sample-trees", HIERA),
        ("sample-landuse-seg", PRITHVI),
        ("sample-landuse-seg", PRITHVI_600),
        ("sample-landuse-seg", DOFA),
        ("sample-trees", DOFA),
    ]:
        made, opened = given(dataset, backbone)
        one = tensor(made, opened)[0]
        middle = backbone.input_size // 2
        found[dataset, backbone.variant] = [
            round(float(v), 4) for v in (one.mean(), one.std(), one[0, middle, middle], one[-1, 3, 7])
        ]
    assert found == {key: pytest.approx(value, abs=2e-4) for key, value in GOLDEN.items()}


# Mean, standard deviation, the first band at the middle, and the last near the upper left corner.
GOLDEN = {
    ("sample-landuse", "csmask_b4"): [-0.421, 0.3531, -0.5885, 0.0138],
    ("sample-landuse", "lite0"): [-0.2282, 0.1175, -0.4187, -0.0677],
    ("sample-trees", "lite0"): [0.198, 0.2256, 0.4214, -0.0673],
    ("sample-landuse-seg", "sam2.1_hiera_l"): [-0.4763, 0.5108, -1.2293, -0.0512],
    ("sample-trees", "sam2.1_hiera_l"): [0.6573, 0.4449, 0.9187, 0.2335],
    ("sample-landuse-seg", "prithvi_eo_v2_300_tl"): [-0.3408, 0.3916, 0.0517, -0.9877],
    ("sample-landuse-seg", "prithvi_eo_v2_600_tl"): [-0.3408, 0.3916, 0.0517, -0.9877],
    ("sample-landuse-seg", "dofa_large_patch16_224"): [-0.6609, 0.8705, -1.7009, -1.4974],
    ("sample-trees", "dofa_large_patch16_224"): [0.2869, 0.4813, 0.7159, -0.1877],
}


def test_the_declared_stretch_makes_a_picture_of_reflectance(given):
    made, opened = given("sample-landuse-seg", LITE0)
    red = opened.image[0].sel(band="red").values / 10000
    np.testing.assert_allclose(tensor(made, opened)[0, 0] * 0.502 + 0.498, np.clip(red / 0.3, 0, 1), atol=1e-5)


def test_resizing_keeps_places(given):
    made, opened = given("sample-trees-seg", LITE0, input_size=64)
    small = tensor(made, opened)[0, 0]
    means = torch.from_numpy(opened.image[0, 0].values / 255.0).reshape(64, 4, 64, 4).mean(dim=(1, 3))
    assert np.corrcoef(small.ravel(), means.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("backbone", [DOFA, dataclasses.replace(HIERA, normalisation="dataset")])
def test_the_datasets_normalisation_is_of_its_training_split_alone(given, backbone):
    made, opened = given("sample-landuse-seg", backbone, input_size=128)
    train = np.flatnonzero(opened.split.values == "train")
    values = torch.cat([tensor(made, opened, train[start : start + 16]) for start in range(0, len(train), 16)])
    np.testing.assert_allclose(values.mean(dim=(0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(values.std(dim=(0, 2, 3)), 1, atol=1e-4)
    everything = tensor(made, opened, slice(None))
    assert abs(float(everything.mean(dim=(0, 2, 3))[0])) > 1e-3


def test_photographs_are_seen_by_a_model_of_reflectance_only_standardised(given):
    with pytest.raises(MissingBandsError, match="8-bit photographs; normalisation: dataset would let it see"):
        given("sample-trees", PRITHVI)
    made, _ = given("sample-trees", PRITHVI, normalisation="dataset")
    assert made.seen.slots == ("blue", "green", "red")
    assert not made.context  # no time is known of these


def test_a_picture_without_a_declared_stretch_is_refused(given, image_dataset, open_images):
    bare = dataclasses.replace(image_dataset("sample-landuse-seg"), display=None)
    with pytest.raises(UserError, match="without a declared stretch"):
        preprocessing.make_preprocessor(open_images(bare), "lite0", LITE0, get_spec(LITE0))


def test_place_and_time_are_latitude_first_and_days_from_0(given):
    made, opened = given("sample-landuse-seg", PRITHVI)
    known = made.where_and_when(opened, slice(0, 2))
    assert made.context == ("place", "time")
    assert known["place"].shape == (2, 2)
    assert known["place"][0] == pytest.approx([52.5, 12.6], abs=0.15)  # Brandenburg: north, then east
    assert known["time"].tolist() == [[[2017.0, 46.0]]] * 2  # 16 February is the 47th day


def test_a_backbone_that_takes_no_place_is_given_none(given):
    made, opened = given("sample-landuse-seg", HIERA)
    assert made.where_and_when(opened, slice(0, 1)) == {}


@pytest.mark.parametrize("absent", ["lat", "time"])
def test_place_and_time_are_never_invented(image_dataset, open_images, absent):
    made = dataclasses.replace(
        image_dataset("sample-landuse-seg"), **{absent: None}, **({"lon": None} if absent == "lat" else {})
    )
    left = {"lat": ("time",), "time": ("place",)}[absent]
    given, images = preprocessing.make_preprocessor(open_images(made), "prithvi", PRITHVI, get_spec(PRITHVI)), open_images(made)
    assert given.metadata_keys == left
    assert tuple(given.metadata(images, slice(0, 1))) == left


@pytest.mark.parametrize("dtype", ["uint16", "float32", "float16"])
def test_the_datasets_own_mean_and_deviation_are_summed_in_float64(images_path, monkeypatch, dtype):
    """A band that hardly changes is where fewer digits show."""
    some = images.open_images(images_path("sample-landuse-seg")).isel(sample=slice(0, 20)).load()
    values = some.image.values.astype(dtype)
    values[:, 1] = 1234.5
    values[0, 1, :64] += 1
    some["image"] = some.image.dims, values
    some["split"] = "sample", np.array(["train"] * 15 + ["test"] * 5)
    monkeypatch.setattr(preprocessing, "_STEP", 4)
    made = preprocessing.make_preprocessor(some, "dofa", DOFA, get_spec(DOFA))
    exact = values[:15, list(made.input_bands.band_indices)].astype(np.float64) / 10_000
    np.testing.assert_allclose(made.mean, exact.mean(axis=(0, 2, 3)), rtol=1e-8)
    np.testing.assert_allclose(made.std, exact.std(axis=(0, 2, 3)), rtol=1e-5)
