import pytest

from pipeline.backbones import get_spec
from pipeline.config import BackboneConfig
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("described", "words"),
    [
        (("vgg", "16", "random", 64), "Families in pipeline/backbones: dofa, efficientnet, hiera, prithvi, raw"),
        (("efficientnet", "b7", "random", 64), "It has: csmask_b4, lite0"),
        (("efficientnet", "lite0", "random", 100), "multiple of 32"),
        (("hiera", "sam2.1_hiera_l", "random", 240), "multiple of 32, the stride of its deepest level"),
        (("prithvi", "prithvi_eo_v2_600_tl", "random", 512), "multiple of 14"),
        (("dofa", "dofa_large_patch16_224", "random", 224), "Set its normalisation to dataset"),
        (("dofa", "dofa_small_patch16_224", "pretrained", 224, 0, "dataset"), "No trained weights"),
        (("hiera", "sam2.1_hiera_t", "none", 64), "has weights: none; set it to pretrained or random"),
        (("raw", "mean_std", "random", 64), "has weights: random; set it to none"),
        (("timm", "resnet19", "random", 64), "timm has no network 'resnet19'. Similar ones: .*resnet"),
    ],
)
def test_a_description_that_cannot_be_is_refused(described, words):
    with pytest.raises(UserError, match=words):
        get_spec(BackboneConfig(*described))


def test_only_described_families_take_a_description():
    with pytest.raises(UserError, match="declares its own eats; remove it"):
        get_spec(BackboneConfig("hiera", "sam2.1_hiera_t", "random", 64, input_units="unit"))
