"""Models start as the frozen model, and a step changes only what is configured."""

import dataclasses

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.finetuning import layers, train
from pipeline.finetuning.model import memory_hint
from pipeline.training.predictions import predict_logits
from pipeline.training.protocol import count_split
from tests.errors import raises


def names_changed_by_one_step(model, job, batch=2) -> set[str]:
    """Names of the parameters and buffers that one step changes."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-3, 0.05))
    train.train_step(model, optimizer, job, job.images.rows("train")[:batch], None)
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def assert_predicts_as_frozen(model, frozen, job):
    counts, frozen_counts = (
        train.count_predictions(model, job, "val"),
        count_split(frozen.data, frozen.head_group, "val")[0],
    )
    assert np.abs(counts - frozen_counts).sum() <= 1e-4 * frozen_counts.sum()
    if not job.task.is_dense:
        frozen_logits = predict_logits(frozen.head_group, frozen.data.splits["test"].inputs)[0]
        logits = torch.cat([logits for logits, _ in train.predict_batches(model, job, "test")])
        np.testing.assert_allclose(logits, frozen_logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("task", "model_name"),
    [("classification", "raw+lite0"), ("segmentation", "prithvi"), ("classification", "hiera")],
)
def test_model_starts_as_the_frozen_model_and_a_step_changes_backbone_and_head(
    frozen_model, make_job, task, model_name
):
    frozen = frozen_model(task, model_name)
    model, job = frozen.trainable(), make_job(frozen)
    assert_predicts_as_frozen(model, frozen, job)
    changed = names_changed_by_one_step(model, job)
    assert any(name.startswith("head.") for name in changed)
    assert any(name.startswith(f"networks.{len(model.networks) - 1}.") for name in changed)
    assert not any("running_" in name for name in changed), "BatchNorm keeps its statistics"
    assert not any("classifier" in name for name in model.trainable_parameters()), "timm's own, which is not used"


@pytest.mark.parametrize(("model_name", "layer"), [("lite0", "conv_pw"), ("prithvi", "attn.qkv")])
def test_lora_starts_as_the_frozen_model_and_trains_adapters_and_head_only(frozen_model, make_job, model_name, layer):
    frozen = frozen_model("classification", model_name)
    model, job = frozen.trainable(method="lora", rank=4), make_job(frozen)
    assert_predicts_as_frozen(model, frozen, job)
    parameters = model.trainable_parameters()
    adapters = [name for name in parameters if not name.startswith("head.")]
    assert any(layer in name for name in adapters)
    assert all("lora_" in name for name in adapters)
    changed = names_changed_by_one_step(model, job)
    assert {name.partition(".")[0] for name in changed} == {"head", "networks"}
    assert changed <= set(parameters)
    n_trained = sum(parameter.numel() for parameter in parameters.values())
    assert n_trained < 0.15 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("model_name", "n_blocks"), [("lite0", 7), ("prithvi", 12), ("hiera", 12)])
def test_unfreeze_last_blocks_trains_these_only(frozen_model, model_name, n_blocks):
    frozen = frozen_model("classification", model_name)
    network = frozen.trainable(method="last2").networks[0]
    assert len(layers.blocks(network)) == n_blocks
    index = layers.layer_index(network)
    trained = {index[name] for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {n_blocks - 1, n_blocks}
    allowed = (f"last{n_blocks}", "all", "lora")
    with raises(UserError, model_name, n_blocks, key="finetune.method", value="last13", allowed=allowed):
        layers.unfreeze(network, 13, model_name)


def test_layer_lr_scale_decays_towards_the_input(frozen_model):
    model = frozen_model("classification", "prithvi").trainable(layer_decay=0.5)
    lr_scale = {
        name.removeprefix("network.network."): scale
        for name, scale in layers.layer_lr_scale(model.networks[0], 0.5).items()
    }
    assert lr_scale["blocks.11.attn.qkv.weight"] == 0.5
    assert lr_scale["blocks.10.attn.qkv.weight"] == 0.25
    assert lr_scale["patch_embed.proj.weight"] == lr_scale["cls_token"] == 0.5**13
    assert lr_scale["norm.weight"] == 0.5
    groups, parameters = model.parameter_groups(1e-2, 0.1), model.trainable_parameters()
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(rate) == len(parameters)
    weight, bias = model.head.weights[0], model.head.biases[0]
    assert (rate[id(weight)], decay[id(weight)], decay[id(bias)]) == (1e-2, 0.1, 0.0)
    norm = parameters["networks.0.network.network.norm.weight"]
    assert (rate[id(norm)], decay[id(norm)]) == (5e-3, 0.0)


@pytest.mark.parametrize("model_name", ["lite0", "prithvi"])
def test_enable_checkpointing_gives_the_same_gradients_with_less_memory(frozen_model, make_job, model_name):
    frozen = frozen_model("classification", model_name)
    job = make_job(frozen)
    rows = job.images.rows("train")[:2]
    image, label = job.images.batch(rows)
    n_saved, gradients = [], []
    for checkpointing in (False, True):
        model, sizes = frozen.trainable(checkpointing=checkpointing), []

        def record_size(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record_size, lambda tensor: tensor):
            loss = job.task.loss(model(image, rows)[None], torch.from_numpy(label)[None]).sum()
        n_saved.append(sum(sizes))
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.trainable_parameters().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    assert sum(gradient is not None for gradient in gradients[0].values()) > 50
    assert n_saved[1] < n_saved[0] / 2


def test_model_in_bfloat16_is_close_to_float32_and_trains(frozen_model, make_job):
    # Not with Prithvi: torch 2.15's bfloat16 Conv3d of its patches is wrong on some CPUs.
    frozen = frozen_model("classification", "hiera")
    job = make_job(frozen)
    rows = job.images.rows("test")[:1]  # few, because a CPU without bfloat16 is slow
    image, _ = job.images.batch(rows)
    model = frozen.trainable(precision="bfloat16")
    with torch.no_grad():
        (float32,), (bfloat16,) = frozen.trainable().features(image, rows), model.features(image, rows)
    for name, values in float32.items():
        error = (bfloat16[name].float() - values).norm() / values.norm()
        assert 1e-4 < error < 0.03, (name, error)
    assert any("blocks.0." in name for name in names_changed_by_one_step(model, job, 1))


def test_head_of_another_dataset_or_model_is_refused(frozen_model):
    chips, masks = frozen_model("classification", "prithvi"), frozen_model("segmentation", "prithvi")
    other, absent = frozen_model("classification", "lite0"), chips.head_path.with_name("none.pt")
    cases = [
        (chips, {"head_path": masks.head_path}, {"key": "task", "value": "segmentation"}),
        (chips, {"head_path": other.head_path}, {"key": "model", "value": "lite0", "allowed": ["prithvi"]}),
        (chips, {"images": chips.images.assign_attrs(classes=["a", "b"])}, {"key": "classes", "allowed": ["a, b"]}),
        (masks, {"images": masks.images.isel(y=slice(0, 8))}, {"key": "mask size", "allowed": [(8, 16)]}),
        (chips, {"head_path": absent}, {}),
    ]
    for frozen, changes, fields in cases:
        with raises(UserError, path=changes.get("head_path", frozen.head_path), **fields):
            dataclasses.replace(frozen, **changes).trainable()


def test_head_of_features_of_another_shape_is_refused(frozen_model):
    masks = frozen_model("segmentation", "prithvi")
    larger = dataclasses.replace(masks.members[0].backbone, input_size=64)
    member = dataclasses.replace(masks.members[0], backbone=larger)
    with raises(UserError, "prithvi", key="level0/features", value=(192, 4, 4), allowed=[(192, 2, 2)]):
        dataclasses.replace(masks, members=[member]).trainable()


def test_model_without_trainable_parameters_is_refused(frozen_model):
    with raises(UserError, key="grid.finetune", value="raw"):
        frozen_model("classification", "raw").trainable()


def test_network_without_layers_for_lora_or_without_blocks_is_refused():
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3))
    with raises(UserError, "plain", key="finetune.method", value="lora", allowed=("all", "last<n>")):
        layers.add_lora(plain, 4, 0, "plain")
    with raises(UserError, "plain", key="finetune.method", value="last1", allowed=("all", "lora")):
        layers.unfreeze(plain[0], 1, "plain")


def test_memory_hint_names_the_options_and_passes_other_errors_on():
    with raises(UserError, "finetune.checkpointing", "finetune.precision", key="finetune.batch"), memory_hint():
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError), memory_hint():
        torch.ones(2, 3) @ torch.ones(2, 3)
