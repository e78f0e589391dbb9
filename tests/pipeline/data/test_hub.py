import dataclasses

import pytest

from pipeline.config import HubFile
from pipeline.data import download, hub
from pipeline.errors import UserError

FILE = HubFile("someone/small-model", "model.pt", "a" * 40, size=1_348_512_262)


@pytest.fixture
def pinned(tmp_path):
    """A file as its publisher has it, and its description."""
    (tmp_path / "published").write_bytes(b"weights")
    return dataclasses.replace(FILE, sha256=download.file_sha256(tmp_path / "published"))


@pytest.mark.parametrize("place", ["model.pt", "small-model/model.pt"])
def test_a_local_file_is_copied_and_checked(pinned, tmp_path, place):
    local = tmp_path / "local" / place
    local.parent.mkdir(parents=True)
    local.write_bytes(b"weights")
    (tmp_path / "out").mkdir()
    assert hub.fetch_hub_file(pinned, tmp_path / "local", tmp_path / "out").read_bytes() == b"weights"


def test_other_bytes_are_refused_and_not_left_behind(pinned, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"weigh")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="model.pt has SHA-256 .*pinned: it is damaged or not the same file"):
        hub.fetch_hub_file(pinned, tmp_path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_without_a_hub_the_message_says_what_to_put_where(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as refused:
        hub.fetch_hub_file(FILE, tmp_path / "local", tmp_path)
    said = str(refused.value)
    assert f"https://huggingface.co/someone/small-model/resolve/{'a' * 40}/model.pt, 1.35 GB" in said
    assert f"put it at {tmp_path / 'local/small-model/model.pt'}" in said
    assert "weights: random" in said


def test_a_branch_is_no_pin(tmp_path):
    with pytest.raises(UserError, match="The revision 'main' of someone/small-model is not a commit"):
        hub.fetch_hub_file(dataclasses.replace(FILE, revision="main"), tmp_path, tmp_path)


def test_every_official_file_is_pinned():
    from pipeline.backbones.catalog import DOFA, HIERA, PRITHVI

    files = [spec.weights for family in (DOFA, HIERA, PRITHVI) for spec in family.values() if spec.weights]
    assert len(files) == 10
    for file in files:
        assert len(file.revision) == 40
        assert len(file.sha256) == 64
        assert file.size > 10**8
    assert len({file.sha256 for file in files}) == 10
