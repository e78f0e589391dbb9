"""The demo backbones against other readers of the same files: onnxruntime, and the author's network."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet

from pipeline.backbones import create_backbone, get_spec
from pipeline.backbones.base import InputBands
from pipeline.backbones.catalog import EFFICIENTNET
from pipeline.config import BackboneConfig
from pipeline.errors import UserError
from tests.errors import raises


def build(variant, weights, weights_dir, seed=0):
    backbone = BackboneConfig("efficientnet", variant, weights, 64, seed)
    spec = get_spec(backbone)
    input_bands = InputBands(spec.bands, tuple(range(len(spec.bands))), (), 64)
    return create_backbone(backbone, spec, input_bands, weights_dir)


def encoder_session(path):
    """Return a session of the U-Net's ONNX graph, and the names of the encoder's outputs."""
    model = onnx.load(path)
    producers = {name: node for node in model.graph.node for name in node.output}
    names = {
        name
        for node in model.graph.node
        for name in node.input
        if "decoder" in node.name and name in producers and "encoder" in producers[name].name
    }
    for name in sorted(names):
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return onnxruntime.InferenceSession(model.SerializeToString()), sorted(names)


def test_csmask_levels_equal_onnxruntimes(weights_folder, image_dataset):
    path, spec = weights_folder("csmask_b4") / "model_6b_l1c.onnx", EFFICIENTNET["csmask_b4"]
    session, names = encoder_session(path)
    tiles = image_dataset("sample-landuse-seg")
    band_names = [band.common_name for band in tiles.bands]
    order = [band_names.index(name) for name in ("blue", "green", "red", "nir", "swir16", "swir22")]
    image = np.tile(tiles.image[:1, order], (1, 1, 2, 2)) / 10000.0  # the file is for 256 px
    image = (image - np.reshape(spec.mean, (6, 1, 1))) / np.reshape(spec.std, (6, 1, 1))
    image = image.astype(np.float32)
    outputs = session.run(names, {session.get_inputs()[0].name: image})
    expected = {values.shape[1:]: values for values in outputs}
    levels = build("csmask_b4", "pretrained", path.parent)(torch.from_numpy(image)).levels
    shapes = [(32, 64, 64), (56, 32, 32), (160, 16, 16), (448, 8, 8)]
    assert [tuple(level.shape[1:]) for level in levels] == shapes
    for level in levels:
        reference = expected[tuple(level.shape[1:])]
        assert np.corrcoef(level.numpy().ravel(), reference.ravel())[0, 1] > 0.9999  # it computes in float16


def test_csmask_statistics_are_those_published_with_the_weights(weights_folder):
    published = json.loads((weights_folder("csmask_b4") / "model_6b_l1c.json").read_text())["data"]
    statistics, spec = published["dataset_statistics"], EFFICIENTNET["csmask_b4"]
    np.testing.assert_allclose([spec.mean, spec.std], statistics["img"], atol=1e-7)
    assert statistics["band_names"] == list(spec.bands)


@pytest.mark.parametrize(
    ("variant", "channels", "side"), [("lite0", [24, 40, 112, 320], 224), ("lite2", [24, 48, 120, 352], 260)]
)
def test_lite_levels_equal_the_authors_network(variant, channels, side, weights_folder, image_dataset):
    """The author's network pads for one size of images, on which both agree."""
    weights_dir = weights_folder(variant)
    official = EfficientNet.from_name(f"efficientnet-{variant}")
    official.load_state_dict(torch.load(next(weights_dir.glob("*.pth")), weights_only=True))
    official.eval()
    image = torch.from_numpy((image_dataset("sample-trees-seg").image[:2] / 255.0 - 0.498) / 0.502).float()
    image = torch.nn.functional.interpolate(image, size=(side, side), mode="bilinear")
    with torch.inference_mode():
        deepest = official._swish(official._bn0(official._conv_stem(image)))
        for block in official._blocks:
            deepest = block(deepest)
        features = build(variant, "pretrained", weights_dir)(image)
    assert [level.shape[1] for level in features.levels] == channels
    torch.testing.assert_close(features.levels[-1], deepest, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(features.pooled["mean_level3"], deepest.mean((2, 3)), rtol=1e-3, atol=1e-3)


def test_efficientnet_random_weights_follow_the_seed(tmp_path):
    first, repeated, other = (build("lite0", "random", tmp_path, seed) for seed in (0, 0, 1))
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(first(image).levels[3], repeated(image).levels[3])
    assert not torch.equal(first(image).levels[3], other(image).levels[3])
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert not first.training


@pytest.mark.parametrize("variant", ["csmask_b4", "lite0"])
def test_efficientnet_random_control_has_a_signal_on_every_level(variant, images, make_encoder):
    """A control whose levels fade to zero would make any pretrained network look good."""
    pyramid = make_encoder(images, "efficientnet", variant, 64)(images.image[:8].values)
    for level in pyramid.levels:
        std = level.std(axis=(0, 2, 3))
        assert np.median(std) > 1e-3
        assert (std > 0).mean() > 0.9


def test_efficientnet_with_damaged_weights_or_other_names_is_refused(weights_folder, tmp_path):
    path = weights_folder("csmask_b4") / EFFICIENTNET["csmask_b4"].weights_file
    (tmp_path / path.name).write_bytes(path.read_bytes()[:100_000])
    with raises(UserError, path=tmp_path / path.name):
        build("csmask_b4", "pretrained", tmp_path)
    path = tmp_path / EFFICIENTNET["lite0"].weights_file
    tensors = torch.load(next(weights_folder("lite0").glob("*.pth")), weights_only=True)
    tensors["_blocks.3._bn9.weight"] = tensors.pop("_blocks.3._bn2.weight")
    torch.save(tensors, path)
    names = ["blocks.2.0.bn3.weight", "_blocks.3._bn9.weight"]
    with raises(UserError, *names, path=path, value=names):
        build("lite0", "pretrained", tmp_path)
