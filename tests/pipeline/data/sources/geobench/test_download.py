"""Download and unpacking of sets, and their description."""

import dataclasses
import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from pipeline.data.sources import geobench
from pipeline.data.sources.geobench import download
from pipeline.errors import UserError
from stages import fetch
from tests.errors import raises
from tests.pipeline.data.sources.geobench.conftest import dataset_config

CHESAPEAKE = geobench.SETS["m-chesapeake-landcover"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Bytes of the hub's files by path, and the paths of all downloads, in place of the hub's client."""
    fake = SimpleNamespace(files={}, downloads=[])

    def get_paths_info(self, repo, paths, *, repo_type, revision):
        assert (repo, repo_type, revision) == (download.REPO, "dataset", download.REVISION)
        return [
            SimpleNamespace(path=path, size=len(data), lfs=SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()))
            for path, data in fake.files.items() if path in paths
        ]  # fmt: skip

    def hf_hub_download(self, repo, path, *, repo_type, revision, local_dir):
        fake.downloads.append(path)
        (local_dir / path).parent.mkdir(parents=True)
        (local_dir / path).write_bytes(fake.files[path])
        return str(local_dir / path)

    monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info", get_paths_info)
    monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", hf_hub_download)
    return fake


@pytest.fixture
def archive(geobench_root, tmp_path):
    """Function from a set's name to the bytes of its zip archive, as on the hub."""

    def pack(name: str) -> bytes:
        folder = download.local_folder(geobench.SETS[name], geobench_root)
        with zipfile.ZipFile(tmp_path / "packed.zip", "w") as packed:
            for path in folder.iterdir():
                packed.write(path, f"{folder.name}/{path.name}")
        return (tmp_path / "packed.zip").read_bytes()

    return pack


def test_download_set_is_fetched_once_and_unpacked(hub, archive, geobench_root, tmp_path):
    hub.files["segmentation_v1.0/m-chesapeake.zip"] = archive(CHESAPEAKE.name)
    root = tmp_path / "sets"
    record = download.describe_files(CHESAPEAKE, "default", root)
    assert record["files"] == 14
    actual, original = Path(record["folder"]), download.local_folder(CHESAPEAKE, geobench_root)
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (actual, original)]
    contents[1].pop("task_specs.pkl")
    assert contents[0] == contents[1]
    assert not list(root.rglob("*.zip")), "the archive must be removed after unpacking"
    assert download.describe_files(CHESAPEAKE, "default", root) == record
    assert hub.downloads == ["segmentation_v1.0/m-chesapeake.zip"], "the second call must find the folder"


def test_describe_files_has_the_range_of_scores_of_normalizer_json(geobench_root, tmp_path):
    folder = tmp_path / "segmentation_v1.0/m-chesapeake"
    shutil.copytree(download.local_folder(CHESAPEAKE, geobench_root), folder)
    normalizer = folder.parent / "normalizer.json"
    for content, expected in ({}, None), ({CHESAPEAKE.name: [0.5, 0.75]}, [0.5, 0.75]), ({"m-other": [0, 1]}, None):
        normalizer.write_text(json.dumps(content))
        assert download.describe_files(CHESAPEAKE, "default", tmp_path)["score_range"] == expected
    for invalid in ([0.75, 0.5], [50, 75], 3, [0.5], ["a", "b"]):
        normalizer.write_text(json.dumps({folder.name: invalid}))
        with raises(UserError, key=CHESAPEAKE.name, value=invalid, path=normalizer):
            download.describe_files(CHESAPEAKE, "default", tmp_path)


def test_download_other_bytes_than_pinned_or_too_small_a_disk_is_refused(hub, archive, tmp_path, monkeypatch):
    data = hub.files["classification_v1.0/m-so2sat.zip"] = archive("m-so2sat")
    root = tmp_path / "sets"
    path = root / "classification_v1.0/m-so2sat.zip"
    actual, expected = hashlib.sha256(data).hexdigest(), geobench.SETS["m-so2sat"].archive_sha256
    with raises(UserError, actual, expected, path=path, value=actual, allowed=[expected]):
        download.describe_files(geobench.SETS["m-so2sat"], "default", root)
    assert not path.with_suffix("").exists()
    hub.downloads.clear()
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with raises(UserError, "0.0 GB", key="geobench_dir", path=tmp_path):
        download.describe_files(geobench.SETS["m-so2sat"], "default", tmp_path / "others")
    assert hub.downloads == [], "it must be refused before any request"


def test_fetch_local_folder_needs_no_hub_and_is_not_copied(geobench_root, monkeypatch, params, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for root in (geobench_root, geobench_root / "classification_v1.0"):
        params = dataclasses.replace(params, geobench_dir=str(root))
        record = geobench.fetch(dataset_config("m-eurosat"), params)
        assert record["folder"] == str(geobench_root / "classification_v1.0/m-eurosat")
    with raises(UserError, "default", "0.01x_train", key="partition", value="0.1x") as info:
        geobench.fetch(dataset_config("m-eurosat", partition="0.1x"), params)
    assert {"0.01x_train", "default"} <= set(info.value.allowed)
    params = dataclasses.replace(params, geobench_dir=str(tmp_path))
    expected = tmp_path / "classification_v1.0/m-eurosat"
    with raises(UserError, "m-eurosat", expected, key="geobench_dir", value=str(tmp_path), path=expected):
        geobench.fetch(dataset_config("m-eurosat"), params)


def zero_bytes(data: bytearray) -> None:
    data[60:90] = bytes(30)


def set_encrypted_flag(data: bytearray) -> None:
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1


PARTITION = "default_partition.json"


@pytest.mark.parametrize(
    ("members", "damage"),
    [
        ({"a/id_0.hdf5": "x", "a/readme.json": "{}"}, None),
        ({f"a/{PARTITION}": "{}", f"b/{PARTITION}": "[]"}, None),
        ({f"a/{PARTITION}": "0123456789" * 99}, zero_bytes),
        ({f"a/{PARTITION}": "{}"}, set_encrypted_flag),
        ({f"a/{PARTITION}": "{}"}, bytearray.pop),
    ],
    ids=["no partition", "two files of one name", "damaged", "encrypted", "truncated"],
)
def test_unpack_invalid_archive_leaves_no_files(tmp_path, members, damage):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    if damage:
        damage(data := bytearray(path.read_bytes()))
        path.write_bytes(data)
    with raises(UserError, path, path=path):
        download._unpack(path, tmp_path / "sets/set")
    assert path.exists()
    assert list((tmp_path / "sets").iterdir()) == []


def test_fetch_digest_of_the_code_depends_on_the_catalog(tmp_path):
    package = shutil.copytree(Path(geobench.__file__).parent, tmp_path / "geobench")
    digest = fetch._code_digest(package / "__init__.py")
    with open(package / "catalog.yaml", "a") as file:
        file.write("# changed\n")
    assert fetch._code_digest(package / "__init__.py") != digest


def test_estimate_size_counts_local_samples_and_skips_unreadable_ones(geobench_root, params, tmp_path):
    folder = tmp_path / "m-so2sat"
    shutil.copytree(geobench_root / "classification_v1.0/m-so2sat", folder)
    partition = json.loads((folder / PARTITION).read_text())
    (folder / "mine_partition.json").write_text(json.dumps(partition | {"train": partition["train"][:2]}))
    (folder / "id_0000.hdf5").write_bytes(b"")
    local, remote = (dataclasses.replace(params, geobench_dir=str(root)) for root in (tmp_path, tmp_path / "none"))
    with raises(UserError, path=folder / "id_0000.hdf5"):
        geobench.estimate_size(dataset_config("m-so2sat", partition="mine"), local)
    size, download_bytes = geobench.estimate_size(dataset_config("m-so2sat", partition="mine", skip_bad=True), local)
    assert (size.n_samples, download_bytes) == (10, 0)
    assert size.images_per_second > 0
    for partition, n_train in (("mine", 19992), ("0.01x_train", 200)):
        size, download_bytes = geobench.estimate_size(dataset_config("m-so2sat", partition=partition), remote)
        assert size.n_samples == n_train + sum(geobench.SETS["m-so2sat"].split_sizes[1:])
        assert download_bytes > 1e9
