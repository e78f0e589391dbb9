"""Checkpoints of heads: the logits of a loaded head on stored features are those of the trained group."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.reader import FeatureStore
from pipeline.config import HeadsConfig, LinearHeadConfig, UPerNetHeadConfig
from pipeline.errors import UserError
from pipeline.heads import checkpoint
from pipeline.training import task_data
from pipeline.training.loop import HParams
from pipeline.training.predictions import predict_logits
from pipeline.training.protocol import train_heads, trained_head
from tests.errors import raises

HEADS = HeadsConfig(
    LinearHeadConfig("all", "mean", steps=40, batch=20), UPerNetHeadConfig(channels=4, steps=4, batch=4)
)
HPARAMS = [HParams(1e-2, 1e-3, seed) for seed in (5, 6)]


def train(stores_and_images, names, **changes):
    """Train two heads; return the stores' folders, the data and the group."""
    stores, images = stores_and_images
    paths = {stores[name].location: None for name in names}
    heads = dataclasses.replace(HEADS, **changes)
    data = task_data.load(paths, Path(images.encoding["source"]), heads, ("train", "val", "test"), "cpu")
    return list(paths), data, train_heads(data, HPARAMS)


def stored_features(paths, array_names, split):
    """Stored features of a split, as the backbones would return them."""
    rows = FeatureStore(paths[0]).rows(split)
    return [
        {name: torch.from_numpy(FeatureStore(path).read(name, rows)).float() for name in names}
        for path, names in zip(paths, array_names, strict=True)
    ]


@pytest.mark.parametrize("fusion", ["concat", "film"])
def test_load_of_a_linear_head_has_the_trained_logits(informative_chips, tmp_path, fusion):
    paths, data, group = train(informative_chips, ["high", "low"], fusion=fusion)
    checkpoint.save(tmp_path / "head.pt", trained_head(data, "high+low", group, 1))
    head = checkpoint.load(tmp_path / "head.pt")
    logits = head.logits(stored_features(paths, head.array_names, "test")).detach()
    expected = predict_logits(group, data.splits["test"].inputs)
    np.testing.assert_allclose(logits, expected[1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(logits, expected[0], atol=1e-3)
    assert head.backbones == ["high", "low"]
    assert (head.task, len(head.class_names)) == ("classification", 4)


@pytest.mark.parametrize("segmentation", ["upernet", "fcn"])
def test_load_of_a_dense_head_has_the_trained_logits(informative_masks, tmp_path, segmentation):
    paths, data, group = train(informative_masks, ["fine", "coarse"], segmentation=segmentation)
    checkpoint.save(tmp_path / "head.pt", trained_head(data, "fine+coarse", group, 0))
    head = checkpoint.load(tmp_path / "head.pt")
    features = stored_features(paths, head.array_names, "val")
    before = [value.clone() for member in features for value in member.values()]
    ((_, expected), _) = group.forward_heads(data.splits["val"].inputs, None)
    torch.testing.assert_close(head.logits(features), expected[0], rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, before, [value for member in features for value in member.values()]))


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


@pytest.mark.parametrize(
    "content",
    [{"format": "another"}, {"format": "eo-compose head 1"}, [], Payload(), None],
    ids=["another format", "the format before", "a list", "code", "not a torch file"],
)
def test_load_of_another_file_is_refused_and_runs_no_code(tmp_path, content):
    path = tmp_path / "head.pt"
    if content is None:
        path.write_bytes(b"not a file of torch's")
    else:
        torch.save(content, path)
    with raises(UserError, path, allowed=[checkpoint.FORMAT], path=path):
        checkpoint.load(path)


def test_load_of_a_missing_file_is_refused(tmp_path):
    with raises(UserError, "dvc repro train", path=tmp_path / "head.pt"):
        checkpoint.load(tmp_path / "head.pt")
