"""The exact tensors that reach the networks, from the files to the first layer."""

import dataclasses

import numpy as np
import pytest
import torch
import xarray as xr

from pipeline.backbones import get_spec, preprocessing
from pipeline.backbones.base import MissingBandsError
from pipeline.config import BackboneConfig
from pipeline.data import image_store
from pipeline.errors import UserError
from tests.errors import raises

DOFA = BackboneConfig("dofa", "dofa_large_patch16_224", "random", 224, normalisation="dataset")
PRITHVI = BackboneConfig("prithvi", "prithvi_eo_v2_300_tl", "random", 224)
PRITHVI_600 = BackboneConfig("prithvi", "prithvi_eo_v2_600_tl", "random", 224)
HIERA = BackboneConfig("hiera", "sam2.1_hiera_l", "random", 224)
CSMASK = BackboneConfig("efficientnet", "csmask_b4", "random", 128)
LITE0 = BackboneConfig("efficientnet", "lite0", "random", 128)


@pytest.fixture
def make_preprocessor(images_path):
    def make(dataset, backbone, **changes):
        images, backbone = image_store.open_images(images_path(dataset)), dataclasses.replace(backbone, **changes)
        preprocessor = preprocessing.make_preprocessor(images, backbone.variant, backbone, get_spec(backbone))
        return preprocessor, images

    return make


def network_input(preprocessor, images, rows=slice(0, 1)):
    return preprocessor(torch.from_numpy(preprocessor.select_bands(images.image[rows].values)))


# Mean, standard deviation, the first band at the middle, and the last near the upper left corner.
GOLDEN = [
    ("sample-landuse", CSMASK, [-0.421, 0.3531, -0.5885, 0.0138]),
    ("sample-trees", LITE0, [0.198, 0.2256, 0.4214, -0.0673]),
    ("sample-landuse-seg", HIERA, [-0.4763, 0.5108, -1.2293, -0.0512]),
    ("sample-landuse-seg", PRITHVI, [-0.3408, 0.3916, 0.0517, -0.9877]),
    ("sample-landuse-seg", PRITHVI_600, [-0.3408, 0.3916, 0.0517, -0.9877]),
    ("sample-landuse-seg", DOFA, [-0.7520, 0.8776, -1.8842, -1.4974]),
    ("sample-trees", DOFA, [0.2869, 0.4813, 0.7159, -0.1877]),
]


@pytest.mark.parametrize(("dataset", "backbone", "expected"), GOLDEN)
def test_preprocessor_of_a_real_chip_gives_golden_values(make_preprocessor, dataset, backbone, expected):
    """Pins the whole way from the file to the network; a change here changes every feature."""
    image = network_input(*make_preprocessor(dataset, backbone))[0]
    middle = backbone.input_size // 2
    actual = [float(value) for value in (image.mean(), image.std(), image[0, middle, middle], image[-1, 3, 7])]
    assert actual == pytest.approx(expected, abs=2e-4)


def test_preprocessor_resize_keeps_positions(make_preprocessor):
    preprocessor, images = make_preprocessor("sample-trees-seg", LITE0, input_size=64)
    small = network_input(preprocessor, images)[0, 0]
    means = torch.from_numpy(images.image[0, 0].values / 255.0).reshape(64, 4, 64, 4).mean(dim=(1, 3))
    assert np.corrcoef(small.ravel(), means.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("backbone", [DOFA, dataclasses.replace(HIERA, normalisation="dataset")])
def test_preprocessor_with_dataset_normalisation_uses_the_training_split_only(make_preprocessor, backbone):
    preprocessor, images = make_preprocessor("sample-landuse-seg", backbone, input_size=128)
    train = np.flatnonzero(images.split.values == "train")
    batches = [train[start : start + 16] for start in range(0, len(train), 16)]
    values = torch.cat([network_input(preprocessor, images, rows) for rows in batches])
    np.testing.assert_allclose(values.mean(dim=(0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(values.std(dim=(0, 2, 3)), 1, atol=1e-4)
    all_splits = network_input(preprocessor, images, slice(None))
    assert abs(float(all_splits.mean(dim=(0, 2, 3))[0])) > 1e-3


def test_preprocessor_of_photographs_for_a_reflectance_model_needs_dataset_normalisation(make_preprocessor):
    with raises(MissingBandsError, key="backbones.prithvi_eo_v2_300_tl.normalisation", allowed=("dataset",)):
        make_preprocessor("sample-trees", PRITHVI)
    preprocessor, _ = make_preprocessor("sample-trees", PRITHVI, normalisation="dataset")
    assert preprocessor.input_bands.input_names == ("blue", "green", "red")
    assert not preprocessor.metadata_keys  # the time of these is unknown


def test_preprocessor_of_reflectance_for_a_display_model_needs_a_stretch(image_dataset, open_images):
    images = open_images(dataclasses.replace(image_dataset("sample-landuse-seg"), display=None))
    with raises(UserError, "dn", key="display"):
        preprocessing.make_preprocessor(images, "lite0", LITE0, get_spec(LITE0))


def test_metadata_is_latitude_first_and_days_from_0(make_preprocessor):
    preprocessor, images = make_preprocessor("sample-landuse-seg", PRITHVI)
    metadata = preprocessor.metadata(images, slice(0, 2))
    assert preprocessor.metadata_keys == ("location", "time")
    assert metadata["location"].shape == (2, 2)
    assert metadata["location"][0] == pytest.approx([52.5, 12.6], abs=0.15)  # Brandenburg: north, then east
    assert metadata["time"].tolist() == [[[2017.0, 46.0]]] * 2  # 16 February is the 47th day


@pytest.mark.parametrize(("missing", "available"), [(("lat", "lon"), ("time",)), (("time",), ("location",))])
def test_metadata_that_is_unknown_is_not_invented(image_dataset, open_images, missing, available):
    dataset = dataclasses.replace(image_dataset("sample-landuse-seg"), **dict.fromkeys(missing))
    images = open_images(dataset)
    preprocessor = preprocessing.make_preprocessor(images, "prithvi", PRITHVI, get_spec(PRITHVI))
    assert preprocessor.metadata_keys == available
    assert tuple(preprocessor.metadata(images, slice(0, 1))) == available


@pytest.mark.parametrize("dtype", ["uint16", "float16"])
def test_preprocessor_with_dataset_normalisation_adds_up_in_float64_and_reads_each_file_of_the_training_split_once(
    images_path, monkeypatch, dtype
):
    """A band that hardly changes shows a loss of precision."""
    read, getitem = [], xr.DataArray.__getitem__

    def count(array, key):
        if array.ndim == 4 and isinstance(key, slice):
            read.extend(range(*key.indices(len(array))))
        return getitem(array, key)

    images = image_store.open_images(images_path("sample-landuse-seg")).isel(sample=slice(0, 20)).load()
    values = images.image.values.astype(dtype)
    values[:, 1] = 1234.5
    values[0, 1, :64] += 1
    images["image"] = images.image.dims, values
    images["split"] = "sample", np.array(["train"] * 15 + ["test"] * 5)
    images.image.encoding["preferred_chunks"] = {"sample": 4}
    monkeypatch.setattr(xr.DataArray, "__getitem__", count)
    preprocessor = preprocessing.make_preprocessor(images, "dofa", DOFA, get_spec(DOFA))
    assert sorted(read) == list(range(16))
    exact = values[:15, list(preprocessor.input_bands.band_indices)].astype(np.float64) / 10_000
    np.testing.assert_allclose(preprocessor.mean, exact.mean(axis=(0, 2, 3)), rtol=1e-8)
    np.testing.assert_allclose(preprocessor.std, exact.std(axis=(0, 2, 3)), rtol=1e-5)


def test_preprocessor_with_dataset_normalisation_needs_training_samples(images):
    images = images.copy()
    images["split"] = "sample", np.array(["test"] * len(images.sample))
    with raises(UserError, key="normalisation", value="dataset"):
        preprocessing.make_preprocessor(images, "dofa", DOFA, get_spec(DOFA))
