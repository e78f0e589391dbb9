"""A backbone of terratorch's registry that only params.yaml describes."""

import numpy as np
import torch
from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY

from pipeline.config import HubFile
from pipeline.errors import UserError
from tests.errors import raises

MOCO = "ssl4eos12_resnet18_sentinel2_all_moco"
OPTIONS = {"model_bands": ["BLUE", "GREEN", "RED"], "out_indices": [1, 2, 3, 4]}
RGB = ("blue", "green", "red")
KEYS = {"bands": RGB, "input_units": "reflectance", "normalisation": "dataset", "options": OPTIONS}


def test_terratorch_levels_equal_its_own(images, make_encoder, tmp_path):
    torch.manual_seed(3)
    official = TERRATORCH_BACKBONE_REGISTRY.build(MOCO, **OPTIONS).eval()
    torch.save(official.state_dict(), tmp_path / "moco.pth")
    hub = HubFile("someone/moco", "moco.pth", "0" * 40)
    encoder = make_encoder(images, "terratorch", MOCO, 64, tmp_path, hub=hub, **KEYS)
    image = images.image[:2].values
    with torch.inference_mode():
        expected = official(encoder.prepare(image))
    features = encoder(image)
    assert [level.shape[1:] for level in features.levels] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    for level, expected_level in zip(features.levels, expected, strict=True):
        np.testing.assert_allclose(level, expected_level, rtol=1e-4, atol=1e-4)


def test_terratorch_tokens_become_maps(images, make_encoder):
    keys = {**KEYS, "options": {"bands": ["BLUE", "GREEN", "RED"], "num_frames": 1}, "layers": (1, 3)}
    encoder = make_encoder(images, "terratorch", "prithvi_eo_tiny", 224, **keys)
    pyramid = encoder(images.image[:1].values)
    assert [level.shape for level in pyramid.levels] == [(1, 256, 14, 14)] * 2
    assert list(pyramid.pooled) == ["mean_level0", "mean_level1", "cls_level0", "cls_level1"]


def test_terratorch_description_that_does_not_fit_is_refused(images, make_encoder):
    with raises(UserError, "moco", key="variant", value="moco", allowed=sorted(TERRATORCH_BACKBONE_REGISTRY)):
        make_encoder(images, "terratorch", "moco", 64, **KEYS)
    options = {"colour": "red"}
    with raises(UserError, MOCO, options, key="options", value=options):
        make_encoder(images, "terratorch", MOCO, 64, **{**KEYS, "options": options})
    encoder = make_encoder(images, "terratorch", MOCO, 64, **{**KEYS, "options": {"model_bands": ["B", "G", "R"]}})
    with raises(UserError, MOCO, key="layers", allowed=(0,)):
        encoder(images.image[:1].values)
