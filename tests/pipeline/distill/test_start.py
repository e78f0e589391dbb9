"""Trained weights of a backbone as a student's start."""

import pytest
import torch

from pipeline import students
from pipeline.backbones import build, spec
from pipeline.distill import start
from pipeline.encoding.pyramid import Seen
from pipeline.errors import UserError
from pipeline.params import Backbone

LITE0 = Backbone("efficientnet", "lite0", "pretrained", 64)
SHAPE = students.Shape("tf_efficientnet_lite0", 3, 4, "classification", 64)
RGB = ("red", "green", "blue")


def test_the_start_is_the_backbone_itself(weights):
    declared, image = spec(LITE0), torch.randn(2, 3, 64, 64)
    network = build(LITE0, declared, Seen(RGB, (0, 1, 2), (None,) * 3, 64), weights("lite0"))
    begun = start.trained("lite0", LITE0, declared, weights("lite0"), SHAPE, RGB)
    student = start.make(SHAPE, [0.0] * 3, [1.0] * 3, begun, 0).eval()
    with torch.inference_mode():
        for ours, theirs in zip(student.levels(image), network(image).levels, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_bands_keep_their_own_filters_in_any_order(weights):
    declared, image = spec(LITE0), torch.randn(2, 3, 64, 64)
    maps = []
    for order in ((0, 1, 2), (2, 0, 1)):
        bands = [RGB[place] for place in order]
        begun = start.trained("lite0", LITE0, declared, weights("lite0"), SHAPE, bands)
        student = start.make(SHAPE, [0.0] * 3, [1.0] * 3, begun, 0).eval()
        with torch.inference_mode():
            maps.append(student.levels(image[:, order])[0])
    torch.testing.assert_close(*maps, atol=1e-3, rtol=1e-3)


def test_more_bands_keep_the_first_layers_size(weights):
    declared = spec(LITE0)
    shape = students.Shape("tf_efficientnet_lite0", 6, 4, "classification", 64)
    begun = start.trained("lite0", LITE0, declared, weights("lite0"), shape, [*RGB, "nir", "swir16", "swir22"])
    own = start.trained("lite0", LITE0, declared, weights("lite0"), SHAPE, RGB)
    wide, narrow = begun["conv_stem.weight"], own["conv_stem.weight"]
    assert wide.shape[1] == 6
    torch.testing.assert_close(wide.sum(dim=1), narrow.sum(dim=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(wide[:, 0], narrow[:, 0] / 2)


def test_random_starts_follow_their_seed():
    shape = students.Shape("mobilenetv3_small_050", 2, 3, "classification", 32)
    one, two, other = (start.make(shape, [0.0] * 2, [1.0] * 2, None, seed).head.weight for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_another_networks_weights_are_refused(weights, tmp_path):
    other = students.Shape("mobilenetv3_small_050", 3, 4, "classification", 64)
    with pytest.raises(UserError, match="Backbone 'lite0' is not the network mobilenetv3_small_050"):
        start.trained("lite0", LITE0, spec(LITE0), weights("lite0"), other, RGB)
    with pytest.raises(UserError, match="no file of a timm network"):
        start.trained("lite0", LITE0, spec(LITE0), tmp_path, SHAPE, RGB)
