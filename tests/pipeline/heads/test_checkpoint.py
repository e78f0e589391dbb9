"""Checkpoints of heads: the logits of a loaded head on stored features are those of the trained group."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.reader import FeatureStore
from pipeline.config import FcnHeadConfig, HeadsConfig, LinearHeadConfig, UPerNetHeadConfig
from pipeline.errors import UserError
from pipeline.heads import checkpoint
from pipeline.training import task_data
from pipeline.training.loop import HParams
from pipeline.training.protocol import train_heads, trained_head
from tests.errors import raises

HEADS = HeadsConfig(LinearHeadConfig("all", "mean", 20, 20), UPerNetHeadConfig(4, 4, 4), FcnHeadConfig(10, 4))
HPARAMS = [HParams(1e-2, 1e-3, seed) for seed in (5, 6)]


@pytest.mark.parametrize("changes", [{}, {"fusion": "film"}, {"segmentation": "upernet"}, {"segmentation": "fcn"}])
def test_load_of_a_head_has_the_trained_logits(informative_chips, informative_masks, tmp_path, changes):
    is_dense = "segmentation" in changes
    names = ("fine", "coarse") if is_dense else ("high", "low")
    stores, images = informative_masks if is_dense else informative_chips
    paths = {stores[name].location: None for name in names}
    config = dataclasses.replace(HEADS, **changes)
    data = task_data.load(paths, Path(images.encoding["source"]), config, ("train", "val"), "cpu")
    group = train_heads(data, HPARAMS)
    checkpoint.save(tmp_path / "head.pt", trained_head(data, "+".join(names), group, 1))
    head = checkpoint.load(tmp_path / "head.pt")
    assert (head.backbones, head.task, list(head.class_names)) == (list(names), data.task.type, data.class_names)
    rows = stores[names[0]].rows("val")
    features = [
        {array: torch.from_numpy(FeatureStore(path).read(array, rows)).float() for array in arrays}
        for path, arrays in zip(paths, head.array_names, strict=True)
    ]
    before = [value.clone() for member in features for value in member.values()]
    trained = torch.cat([logits for _, logits in group.forward_heads(data.splits["val"].inputs, None)])
    torch.testing.assert_close(head.logits(features), trained[1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(*trained.detach(), atol=1e-3)
    assert all(map(torch.equal, before, [value for member in features for value in member.values()]))


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


@pytest.mark.parametrize(
    "content", [{"format": "eo-compose head 1"}, [], Payload(), None], ids=["another format", "list", "code", "text"]
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
