import numpy as np
import pytest
import torch

from pipeline import images
from pipeline.backbones import family, spec
from pipeline.encode import Encoder, check_units
from pipeline.errors import UserError


@pytest.fixture
def encoder(store, weights):
    def make(dataset, variant, input_size=128):
        opened = images.open_images(store(dataset))
        declared = spec("efficientnet", variant)
        network = family("efficientnet").build(variant, "pretrained", weights(variant), 0)
        return Encoder(declared, network, opened.band.values.tolist(), opened.attrs, input_size, "cpu"), opened

    return make


def test_the_tensor_that_reaches_csmask(encoder):
    sealed, opened = encoder("sample-landuse-seg", "csmask_b4")
    tensor = sealed.prepare(opened.image[:1].values)
    # Blue first: DN/10000, then the network's own statistics, by hand for one pixel of B02, B08 and B12.
    for position, (band, mean, std) in enumerate(
        [
            ("blue", 0.27552253, 0.24488002),
            ("nir", 0.33431220, 0.23213787),
            ("swir22", 0.15826508, 0.12604216),
        ]
    ):
        value = float(opened.image[0, opened.band.values.tolist().index(band), 40, 50]) / 10000
        assert tensor[0, (0, 3, 5)[position], 40, 50] == pytest.approx((value - mean) / std, abs=1e-6)
    assert tensor.shape == (1, 6, 128, 128)


def test_golden_tensors_of_one_real_chip(encoder):
    """Pins the whole way from the file to the network; a change here changes every feature."""
    found = {}
    for dataset, variant in [
        ("sample-landuse", "csmask_b4"),
        ("sample-landuse", "lite0"),
        ("sample-trees", "lite0"),
    ]:
        sealed, opened = encoder(dataset, variant)
        tensor = sealed.prepare(opened.image[:1].values)[0]
        found[dataset, variant] = [round(float(v), 4) for v in (tensor.mean(), tensor.std(), tensor[0, 64, 64])]
    assert found == GOLDEN


# Mean, standard deviation, and the first band at the middle.
GOLDEN = {
    ("sample-landuse", "csmask_b4"): [-0.421, 0.3531, -0.5885],
    ("sample-landuse", "lite0"): [-0.2282, 0.1175, -0.4187],
    ("sample-trees", "lite0"): [0.198, 0.2256, 0.4214],
}


def test_the_declared_stretch_makes_a_picture_of_reflectance(encoder):
    sealed, opened = encoder("sample-landuse-seg", "lite0")
    tensor = sealed.prepare(opened.image[:1].values) * 0.502 + 0.498
    red = opened.image[0, opened.band.values.tolist().index("red")].values / 10000
    np.testing.assert_allclose(tensor[0, 0], np.clip(red / 0.3, 0, 1), atol=1e-5)


def test_resizing_keeps_places(encoder):
    sealed, opened = encoder("sample-trees-seg", "lite0", input_size=64)
    small = sealed.prepare(opened.image[:1].values)[0, 0]
    means = torch.from_numpy(opened.image[0, 0].values / 255.0).reshape(64, 4, 64, 4).mean(dim=(1, 3))
    assert np.corrcoef(small.ravel(), means.ravel())[0, 1] > 0.95


def test_units_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="wants reflectance"):
        check_units(spec("efficientnet", "csmask_b4"), "uint8", None)
    with pytest.raises(UserError, match="without a declared stretch"):
        check_units(spec("efficientnet", "lite0"), "dn", None)


def test_a_missing_band_stops_the_encoder(encoder, store, weights):
    with pytest.raises(UserError, match="swir16, swir22 are wanted, but these images have red"):
        encoder("sample-trees", "csmask_b4")


def test_batches_do_not_matter_even_after_terratorch_lowered_the_precision(encoder):
    sealed, opened = encoder("sample-landuse", "lite0")
    torch.set_float32_matmul_precision("medium")  # as importing terratorch does
    together = sealed(opened.image[:5].values).pooled["mean_level3"]
    alone = np.concatenate([sealed(opened.image[i : i + 1].values).pooled["mean_level3"] for i in range(5)])
    np.testing.assert_allclose(together, alone, atol=1e-4)
