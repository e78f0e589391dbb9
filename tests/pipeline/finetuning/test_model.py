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
from tests.pipeline.finetuning.conftest import CONFIG


def names_changed_by_one_step(model, job, batch=2) -> set[str]:
    """Names of the parameters and buffers that one step changes."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-3, 0.05))
    train.train_step(model, optimizer, job, job.images.rows("train")[:batch], None)
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize(
    ("task", "model_name", "adapted"),
    [
        ("classification", "raw+lite0", ""),
        ("segmentation", "prithvi", ""),
        ("classification", "hiera", ""),
        ("classification", "lite0", "conv_pw"),
        ("classification", "prithvi", "attn.qkv"),
    ],
)
def test_model_starts_as_the_frozen_model_and_a_step_changes_its_trainable_parameters(
    frozen_model, task, model_name, adapted
):
    frozen = frozen_model(task, model_name)
    model, job = frozen.trainable(method="lora" if adapted else "all", rank=4), frozen.job()
    counts = train.count_predictions(model, job, "val")
    frozen_counts = count_split(frozen.data, frozen.head_group, "val")
    assert np.abs(counts - frozen_counts[0]).sum() <= 1e-4 * frozen_counts.sum()
    if not job.task.is_dense:
        frozen_logits = predict_logits(frozen.head_group, frozen.data.splits["test"].inputs)[0]
        logits = torch.cat([logits for logits, _ in train.predict_batches(model, job, "test")])
        np.testing.assert_allclose(logits, frozen_logits, rtol=1e-3, atol=1e-3)
    changed, parameters = names_changed_by_one_step(model, job), model.trainable_parameters()
    assert any(name.startswith("head.") for name in changed)
    assert any(name.startswith(f"networks.{len(model.networks) - 1}.") for name in changed)
    assert changed <= set(parameters), "BatchNorm keeps its statistics"
    assert not any("classifier" in name for name in parameters), "timm's own, which is not used"
    if adapted:
        adapters = [name for name in parameters if not name.startswith("head.")]
        assert any(adapted in name for name in adapters)
        assert all("lora_" in name for name in adapters)
        n_trained = sum(parameter.numel() for parameter in parameters.values())
        assert n_trained < 0.15 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("model_name", "n_blocks"), [("lite0", 7), ("prithvi", 12), ("hiera", 12)])
def test_make_trainable_last_blocks_trains_these_only(frozen_model, model_name, n_blocks):
    network = frozen_model("classification", model_name).trainable(method="last2").networks[0]
    index = layers.layer_index(network)
    trained = {index[name] for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {n_blocks - 1, n_blocks}
    allowed = (f"last{n_blocks}", "all", "lora")
    with raises(UserError, model_name, n_blocks, key="finetune.method", value="last13", allowed=allowed):
        layers.make_trainable(network, model_name, dataclasses.replace(CONFIG, method="last13"), 0)


@pytest.mark.parametrize(("method", "allowed"), [("lora", ("all", "last<n>")), ("last1", ("all", "lora"))])
def test_make_trainable_network_without_blocks_is_refused(method, allowed):
    with raises(UserError, "plain", key="finetune.method", value=method, allowed=allowed):
        layers.make_trainable(torch.nn.Conv2d(3, 4, 3), "plain", dataclasses.replace(CONFIG, method=method), 0)


def test_layer_lr_scale_decays_towards_the_input(frozen_model):
    model = frozen_model("classification", "prithvi").trainable(layer_decay=0.5)
    lr_scale = layers.layer_lr_scale(model.networks[0], 0.5).items()
    lr_scale = {name.removeprefix("network.network."): scale for name, scale in lr_scale}
    assert lr_scale["blocks.11.attn.qkv.weight"] == lr_scale["norm.weight"] == 0.5
    assert lr_scale["blocks.10.attn.qkv.weight"] == 0.25
    assert lr_scale["patch_embed.proj.weight"] == lr_scale["cls_token"] == 0.5**13
    groups, parameters = model.parameter_groups(1e-2, 0.1), model.trainable_parameters()
    rates = {id(values): (group["lr"], group["weight_decay"]) for group in groups for values in group["params"]}
    assert len(rates) == len(parameters)
    assert rates[id(model.head.weights[0])] == (1e-2, 0.1)
    assert rates[id(model.head.biases[0])] == (1e-2, 0.0)
    assert rates[id(parameters["networks.0.network.network.norm.weight"])] == (5e-3, 0.0)


def test_checkpointing_gives_the_same_gradients_with_less_memory(frozen_model):
    frozen = frozen_model("classification", "prithvi")
    job = frozen.job()
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
    torch.testing.assert_close(gradients[1], gradients[0])
    assert len(gradients[0]) > 50
    assert n_saved[1] < n_saved[0] / 2


def test_model_in_bfloat16_is_close_to_float32_and_trains(frozen_model):
    # Not with Prithvi: torch 2.15's bfloat16 Conv3d of its patches is wrong on some CPUs.
    frozen = frozen_model("classification", "hiera")
    job = frozen.job()
    rows = job.images.rows("test")[:1]  # few, because a CPU without bfloat16 is slow
    model = frozen.trainable(precision="bfloat16")
    with torch.no_grad():
        float32, bfloat16 = (m.features(job.images.image(rows), rows)[0] for m in (frozen.trainable(), model))
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


def test_memory_hint_names_the_options_and_passes_other_errors_on():
    with raises(UserError, "finetune.checkpointing", "finetune.precision", key="finetune.batch"), memory_hint():
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError), memory_hint():
        torch.ones(2, 3) @ torch.ones(2, 3)
