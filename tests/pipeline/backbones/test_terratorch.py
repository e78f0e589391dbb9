"""One more backbone of terratorch's registry, by nothing but its description."""

import numpy as np
import pytest
import torch

from pipeline.config import HubFile
from pipeline.data import image_store
from pipeline.errors import UserError

MOCO = "ssl4eos12_resnet18_sentinel2_all_moco"
OPTIONS = {"model_bands": ["BLUE", "GREEN", "RED"], "out_indices": [1, 2, 3, 4]}
DESCRIBED = {"bands": ("blue", "green", "red"), "eats": "reflectance", "normalisation": "dataset", "options": OPTIONS}


@pytest.fixture
def images(images_path):
    return image_store.open_images(images_path("sample-landuse-seg"))


def test_levels_are_those_of_terratorch(images, make_encoder, tmp_path):
    from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY

    torch.manual_seed(3)
    theirs = TERRATORCH_BACKBONE_REGISTRY.build(MOCO, **OPTIONS).eval()
    torch.save(theirs.state_dict(), tmp_path / "moco.pth")
    sealed = make_encoder(
        images, "terratorch", MOCO, 64, tmp_path, hub=HubFile("someone/moco", "moco.pth", "0" * 40), **DESCRIBED
    )
    image = images.image[:2].values
    with torch.inference_mode():
        expected = theirs(sealed.prepare(image))
    ours = sealed(image)
    assert [level.shape[1:] for level in ours.levels] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    for level, other in zip(ours.levels, expected, strict=True):
        np.testing.assert_allclose(level, other, rtol=1e-4, atol=1e-4)


def test_tokens_become_maps(images, make_encoder):
    described = {**DESCRIBED, "options": {"bands": ["BLUE", "GREEN", "RED"], "num_frames": 1}, "layers": (1, 3)}
    sealed = make_encoder(images, "terratorch", "prithvi_eo_tiny", 224, **described)
    pyramid = sealed(images.image[:1].values)
    assert [level.shape for level in pyramid.levels] == [(1, 256, 14, 14)] * 2
    assert list(pyramid.pooled) == ["mean_level0", "mean_level1", "cls_level0", "cls_level1"]


def test_descriptions_that_do_not_fit(images, make_encoder):
    with pytest.raises(UserError, match="terratorch has no backbone 'moco'"):
        make_encoder(images, "terratorch", "moco", 64, **DESCRIBED)
    with pytest.raises(UserError, match="could not build .* with the options {'colour': 'red'}"):
        make_encoder(images, "terratorch", MOCO, 64, **{**DESCRIBED, "options": {"colour": "red"}})
    one = make_encoder(images, "terratorch", MOCO, 64, **{**DESCRIBED, "options": {"model_bands": ["B", "G", "R"]}})
    with pytest.raises(UserError, match="gives 1 outputs, not those numbered"):
        one(images.image[:1].values)
