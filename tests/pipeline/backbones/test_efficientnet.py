"""The stand-ins against independent readings of the same files: onnxruntime, and the author's own network."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet

from pipeline import backbones
from pipeline.backbones import efficientnet, get_spec
from pipeline.backbones.base import InputBands
from pipeline.config import BackboneConfig
from pipeline.data import image_store
from pipeline.errors import UserError


def build(variant, weights, folder, seed=0):
    described = BackboneConfig("efficientnet", variant, weights, 64, seed)
    declared = get_spec(described)
    seen = InputBands(declared.bands, tuple(range(len(declared.bands))), (), 64)
    return backbones.create_backbone(described, declared, seen, folder)


def in_float32(model):
    """The graph with float16 turned into float32 everywhere, so that arithmetic is not what differs."""

    def widen(tensor):
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            wide = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))

    for tensor in model.graph.initializer:
        widen(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                widen(attribute.t)
            if node.op_type == "Cast" and attribute.i == onnx.TensorProto.FLOAT16:
                attribute.i = onnx.TensorProto.FLOAT
    del model.graph.value_info[:]
    return model


def encoder_features(path):
    """The U-Net's own encoder features, read from its ONNX graph: whatever its decoder takes from its encoder."""
    model = in_float32(onnx.load(path))
    made = {name: node for node in model.graph.node for name in node.output}
    names = {
        name
        for node in model.graph.node
        for name in node.input
        if "decoder" in node.name and name in made and "encoder" in made[name].name
    }
    for name in sorted(names):
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return onnxruntime.InferenceSession(model.SerializeToString()), sorted(names)


def test_csmask_gives_what_onnxruntime_gives(weights_folder, image_dataset):
    path = weights_folder("csmask_b4") / "model_6b_l1c.onnx"
    session, names = encoder_features(path)
    tiles = image_dataset("sample-landuse-seg", chip=256)
    wanted = ["blue", "green", "red", "nir", "swir16", "swir22"]
    order = [[band.common_name for band in tiles.bands].index(name) for name in wanted]
    declared = efficientnet.VARIANTS["csmask_b4"]
    image = tiles.image[:1, order] / 10000.0
    image = (image - np.reshape(declared.mean, (6, 1, 1))) / np.reshape(declared.std, (6, 1, 1))
    image = image.astype(np.float32)
    outputs = session.run(names, {session.get_inputs()[0].name: image})
    theirs = {value.shape[1:]: value for value in outputs}
    ours = build("csmask_b4", "pretrained", path.parent)(torch.from_numpy(image)).levels
    assert [tuple(level.shape[1:]) for level in ours] == [
        (32, 64, 64),
        (56, 32, 32),
        (160, 16, 16),
        (448, 8, 8),
    ]
    for level in ours:
        reference = theirs[tuple(level.shape[1:])]
        assert np.corrcoef(level.numpy().ravel(), reference.ravel())[0, 1] > 0.99999


def test_csmask_statistics_are_those_beside_the_weights(weights_folder):
    described = json.loads((weights_folder("csmask_b4") / "model_6b_l1c.json").read_text())["data"]["dataset_statistics"]
    declared = efficientnet.VARIANTS["csmask_b4"]
    np.testing.assert_allclose([declared.mean, declared.std], described["img"], atol=1e-7)
    assert described["band_names"] == list(declared.bands)


def test_lite0_gives_what_its_authors_network_gives(weights_folder, image_dataset):
    folder = weights_folder("lite0")
    theirs = EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(torch.load(next(folder.glob("*.pth")), weights_only=True))
    theirs.eval()
    image = torch.from_numpy((image_dataset("sample-trees-seg").image[:2] / 255.0 - 0.498) / 0.502).float()
    image = image[..., :224, :224]
    with torch.inference_mode():
        deepest = theirs._swish(theirs._bn0(theirs._conv_stem(image)))
        for block in theirs._blocks:
            deepest = block(deepest)
        ours = build("lite0", "pretrained", folder)(image)
    assert [level.shape[1] for level in ours.levels] == [24, 40, 112, 320]
    torch.testing.assert_close(ours.levels[-1], deepest, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.pooled["mean_level3"], deepest.mean((2, 3)), rtol=1e-3, atol=1e-3)


def test_every_name_of_the_checkpoint_has_one_in_timm(weights_folder):
    network, _ = efficientnet._lite0()
    tensors = torch.load(next(weights_folder("lite0").glob("*.pth")), weights_only=True)
    renamed = {efficientnet.timm_name(name): tensor.shape for name, tensor in tensors.items()}
    assert renamed == {name: tensor.shape for name, tensor in network.state_dict().items()}


def test_random_weights_follow_the_seed(tmp_path):
    first, again, other = (build("lite0", "random", tmp_path, seed) for seed in (0, 0, 1))
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(first(image).levels[3], again(image).levels[3])
    assert not torch.equal(first(image).levels[3], other(image).levels[3])
    assert first(image).levels[3].std() > 1e-4
    assert not any(parameter.requires_grad for parameter in first.parameters())


@pytest.mark.parametrize("variant", ["csmask_b4", "lite0"])
def test_a_random_control_is_alive_on_every_level(variant, images_path, make_encoder):
    """A control whose levels fade to nothing would make any pretrained network look good."""
    opened = image_store.open_images(images_path("sample-landuse-seg"))
    sealed = make_encoder(opened, "efficientnet", variant, 128)
    pyramid = sealed(opened.image[:16].values)
    for level in pyramid.levels:
        spread = level.std(axis=(0, 2, 3))
        assert np.median(spread) > 1e-3
        assert (spread > 0).mean() > 0.9


def test_damaged_weights_are_refused(weights_folder, tmp_path):
    for variant in ("csmask_b4", "lite0"):
        path = weights_folder(variant) / efficientnet.VARIANTS[variant].weights_file
        (tmp_path / path.name).write_bytes(path.read_bytes()[:100_000])
        with pytest.raises(UserError, match=r"Fetch it again"):
            build(variant, "pretrained", tmp_path)


def test_missing_and_unexpected_tensors_are_named(weights_folder, tmp_path):
    tensors = torch.load(next(weights_folder("lite0").glob("*.pth")), weights_only=True)
    tensors["_blocks.3._bn9.weight"] = tensors.pop("_blocks.3._bn2.weight")
    torch.save(tensors, tmp_path / "efficientnet-lite0-57934424.pth")
    with pytest.raises(UserError, match=r"missing blocks.2.0.bn3.weight, unexpected _blocks.3._bn9"):
        build("lite0", "pretrained", tmp_path)
