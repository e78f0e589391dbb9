"""Heads in files: the same logits from raw features as the heads that were trained, and nothing else is read."""

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
from pipeline.training.evaluate import predict_logits
from pipeline.training.head_trainer import HParams
from pipeline.training.protocol import train_heads, trained_head

HEADS = HeadsConfig(
    LinearHeadConfig("all", "mean", steps=40, batch=20), UPerNetHeadConfig(channels=4, steps=4, batch=4)
)
SETTINGS = [HParams(1e-2, 1e-3, seed) for seed in (5, 6)]


def trained(given, names, **changes):
    members, like = given
    stores = {members[name].location: None for name in names}
    heads = dataclasses.replace(HEADS, **changes)
    cell = task_data.load(stores, Path(like.encoding["source"]), heads, ("train", "val", "test"), "cpu")
    return list(stores), cell, train_heads(cell, SETTINGS)


def raw(stores, names, split):
    """What the stores hold of a split, as a backbone would give it."""
    rows = FeatureStore(stores[0]).rows(split)
    return [
        {name: torch.from_numpy(FeatureStore(store).read(name, rows)).float() for name in fields}
        for store, fields in zip(stores, names, strict=True)
    ]


@pytest.mark.parametrize("fusion", ["concat", "film"])
def test_of_chips(informative_chips, tmp_path, fusion):
    stores, cell, group = trained(informative_chips, ["high", "low"], fusion=fusion)
    checkpoint.save(tmp_path / "head.pt", trained_head(cell, "high+low", group, 1))
    head = checkpoint.load(tmp_path / "head.pt")
    said = head.logits(raw(stores, head.array_names, "test"))
    np.testing.assert_allclose(said.detach(), predict_logits(group, cell.splits["test"].inputs)[1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(said.detach(), predict_logits(group, cell.splits["test"].inputs)[0], atol=1e-3)
    assert head.backbones == ["high", "low"]
    assert (head.task, len(head.class_names)) == ("classification", 4)


@pytest.mark.parametrize("segmentation", ["upernet", "fcn"])
def test_of_masks(informative_masks, tmp_path, segmentation):
    stores, cell, group = trained(informative_masks, ["fine", "coarse"], segmentation=segmentation)
    checkpoint.save(tmp_path / "head.pt", trained_head(cell, "fine+coarse", group, 0))
    head = checkpoint.load(tmp_path / "head.pt")
    features = raw(stores, head.array_names, "val")
    before = [value.clone() for member in features for value in member.values()]
    ((_, wanted), _) = group.forward_heads(cell.splits["val"].inputs, None)
    torch.testing.assert_close(head.logits(features), wanted[0], rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, before, [value for member in features for value in member.values()]))


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


@pytest.mark.parametrize("content", [{"format": "another"}, [], Payload(), None])
def test_other_files_are_refused_and_nothing_runs(tmp_path, content):
    if content is None:
        (tmp_path / "head.pt").write_bytes(b"not a file of torch's")
    else:
        torch.save(content, tmp_path / "head.pt")
    with pytest.raises(UserError, match="is no head that train has kept"):
        checkpoint.load(tmp_path / "head.pt")


def test_no_head(tmp_path):
    with pytest.raises(UserError, match="dvc repro train"):
        checkpoint.load(tmp_path / "head.pt")
