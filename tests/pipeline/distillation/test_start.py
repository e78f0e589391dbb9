"""Trained weights of a backbone as a student's start."""

import pytest
import torch

from pipeline.backbones import create_backbone, get_spec
from pipeline.backbones.base import InputBands
from pipeline.config import BackboneConfig
from pipeline.distillation import start, student_files
from pipeline.errors import UserError

LITE0 = BackboneConfig("efficientnet", "lite0", "pretrained", 64)
SHAPE = student_files.StudentSpec("tf_efficientnet_lite0", 3, 4, "classification", 64)
RGB = ("red", "green", "blue")


def test_the_start_is_the_backbone_itself(weights_folder):
    declared, image = get_spec(LITE0), torch.randn(2, 3, 64, 64)
    network = create_backbone(LITE0, declared, InputBands(RGB, (0, 1, 2), (None,) * 3, 64), weights_folder("lite0"))
    begun = start.pretrained_state("lite0", LITE0, declared, weights_folder("lite0"), SHAPE, RGB)
    student = start.make_student(SHAPE, [0.0] * 3, [1.0] * 3, begun, 0).eval()
    with torch.inference_mode():
        for ours, theirs in zip(student.levels(image), network(image).levels, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_bands_keep_their_own_filters_in_any_order(weights_folder):
    declared, image = get_spec(LITE0), torch.randn(2, 3, 64, 64)
    maps = []
    for order in ((0, 1, 2), (2, 0, 1)):
        bands = [RGB[place] for place in order]
        begun = start.pretrained_state("lite0", LITE0, declared, weights_folder("lite0"), SHAPE, bands)
        student = start.make_student(SHAPE, [0.0] * 3, [1.0] * 3, begun, 0).eval()
        with torch.inference_mode():
            maps.append(student.levels(image[:, order])[0])
    torch.testing.assert_close(*maps, atol=1e-3, rtol=1e-3)


def test_more_bands_keep_the_first_layers_size(weights_folder):
    declared = get_spec(LITE0)
    shape = student_files.StudentSpec("tf_efficientnet_lite0", 6, 4, "classification", 64)
    begun = start.pretrained_state("lite0", LITE0, declared, weights_folder("lite0"), shape, [*RGB, "nir", "swir16", "swir22"])
    own = start.pretrained_state("lite0", LITE0, declared, weights_folder("lite0"), SHAPE, RGB)
    wide, narrow = begun["conv_stem.weight"], own["conv_stem.weight"]
    assert wide.shape[1] == 6
    torch.testing.assert_close(wide.sum(dim=1), narrow.sum(dim=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(wide[:, 0], narrow[:, 0] / 2)


def test_random_starts_follow_their_seed():
    shape = student_files.StudentSpec("mobilenetv3_small_050", 2, 3, "classification", 32)
    one, two, other = (start.make_student(shape, [0.0] * 2, [1.0] * 2, None, seed).head.weight for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_another_networks_weights_are_refused(weights_folder, tmp_path):
    other = student_files.StudentSpec("mobilenetv3_small_050", 3, 4, "classification", 64)
    with pytest.raises(UserError, match="Backbone 'lite0' is not the network mobilenetv3_small_050"):
        start.pretrained_state("lite0", LITE0, get_spec(LITE0), weights_folder("lite0"), other, RGB)
    with pytest.raises(UserError, match="no file of a timm network"):
        start.pretrained_state("lite0", LITE0, get_spec(LITE0), tmp_path, SHAPE, RGB)
