"""The hub's own client against a server that speaks its protocol: what is fetched, kept, checked and refused."""

import dataclasses
import hashlib
import json
import re
import shutil
import threading
import zipfile
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from urllib.parse import parse_qs

import pytest
from huggingface_hub import constants

from pipeline.config import DatasetConfig
from pipeline.data.sources import geobench
from pipeline.data.sources.geobench import download
from pipeline.errors import UserError


class Hub(BaseHTTPRequestHandler):
    """One repository's files: their description, and their bytes or parts of them."""

    files: Mapping[str, bytes] = MappingProxyType({})
    asked: Sequence[str] = ()
    breaks_after: int | None = None

    def log_message(self, *_):
        pass

    def do_POST(self):
        wanted = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        found = [
            {"type": "file", "path": path, "size": len(data), "oid": "a" * 40,
             "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
            for path, data in self.files.items() if path in wanted
        ]  # fmt: skip
        self._answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head=False):
        path = self.path.partition(f"/resolve/{download.REVISION}/")[2]
        if path not in self.files:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        data, status, headers = self.files[path], 200, {}
        begin = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        if begin:
            status, headers = 206, {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"}
        headers |= {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": download.REVISION}
        if not head:
            self.asked.append(f"{path} from {begin}")
        self._answer(status, data[begin:], headers, head)

    def _answer(self, status, data, headers, head=False):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if not head:
            stop = len(data) if self.breaks_after is None else self.breaks_after
            self.wfile.write(data[:stop])
            if stop < len(data):
                type(self).breaks_after = None
                self.close_connection = True


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Hub,), {"files": {}, "asked": []}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server.RequestHandlerClass
    server.shutdown()


@pytest.fixture
def archive(geobench_root, tmp_path):
    """A set's folder, zipped as it is on the hub."""

    def pack(name: str) -> bytes:
        folder = download.local_folder(geobench.SETS[name], geobench_root)
        with zipfile.ZipFile(tmp_path / "packed.zip", "w") as packed:
            for path in sorted(folder.iterdir()):
                packed.write(path, f"{folder.name}/{path.name}")
        return (tmp_path / "packed.zip").read_bytes()

    return pack


def block(name: str) -> DatasetConfig:
    return DatasetConfig("geobench", options={"set": name})


def test_a_set_is_fetched_once_checked_and_unpacked(hub, archive, geobench_root, tmp_path):
    hub.files["segmentation_v1.0/m-chesapeake.zip"] = archive("m-chesapeake-landcover")
    root = tmp_path / "sets"
    declared = geobench.SETS["m-chesapeake-landcover"]
    record = download.describe_files(declared, "default", root)
    assert record["files"] == 14
    assert hub.asked == ["segmentation_v1.0/m-chesapeake.zip from 0"]
    ours, theirs = Path(record["folder"]), download.local_folder(declared, geobench_root)
    assert {path.name for path in ours.iterdir()} == {p.name for p in theirs.iterdir() if p.suffix != ".pkl"}
    for path in ours.iterdir():
        assert path.read_bytes() == (theirs / path.name).read_bytes()
    assert not list(root.rglob("*.zip")), "unpacked, an archive is not kept twice"
    assert download.describe_files(declared, "default", root) == record
    assert len(hub.asked) == 1


def test_a_download_that_broke_off_goes_on(hub, archive, tmp_path):
    hub.files["segmentation_v1.0/m-nz-cattle.zip"] = archive("m-nz-cattle")
    hub.breaks_after = 12_000_000
    record = download.describe_files(geobench.SETS["m-nz-cattle"], "default", tmp_path / "sets")
    assert record["files"] == 14
    begins = [int(one.rpartition(" ")[2]) for one in hub.asked]
    assert begins[0] == 0
    assert begins[1] > 0, "the second request asks for the rest alone"


def test_other_bytes_than_the_pinned_are_refused(hub, archive, tmp_path):
    hub.files["classification_v1.0/m-so2sat.zip"] = archive("m-so2sat")
    with pytest.raises(UserError, match="m-so2sat.zip has SHA-256 .*, but ec4d7cefeea4a326"):
        download.describe_files(geobench.SETS["m-so2sat"], "default", tmp_path / "sets")
    assert not (tmp_path / "sets/classification_v1.0/m-so2sat").exists()


def test_a_folder_that_is_there_needs_no_hub_and_is_not_copied(geobench_root, monkeypatch, params, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for root in (geobench_root, geobench_root / "classification_v1.0"):
        params = dataclasses.replace(params, geobench_dir=str(root))
        record = geobench.fetch(block("m-eurosat"), params)
        assert record["folder"] == str(geobench_root / "classification_v1.0/m-eurosat")
    params = dataclasses.replace(params, geobench_dir=str(tmp_path))
    with pytest.raises(UserError) as refused:
        geobench.fetch(block("m-eurosat"), params)
    assert f"Put its folder at {tmp_path}/classification_v1.0/m-eurosat, or name yours as geobench_dir" in str(
        refused.value
    )


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(hub, archive, tmp_path, monkeypatch):
    hub.files["segmentation_v1.0/m-nz-cattle.zip"] = archive("m-nz-cattle")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="needs about .* GB while it is unpacked; 0.0 GB are free"):
        download.describe_files(geobench.SETS["m-nz-cattle"], "default", tmp_path / "sets")
    assert hub.asked == []


def packed(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, text in members.items():
            made.writestr(name.replace("__", "/"), text)
    return path


def flipped(path):
    data = bytearray(path.read_bytes())
    data[60:90] = bytes(30)
    path.write_bytes(data)


def encrypted(path):
    data = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + place] |= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("members", "damage", "words"),
    [
        ({"a__id_0.hdf5": "x", "a__readme.json": "{}"}, None, "has no partition of GEO-Bench's within"),
        ({"a__default_partition.json": "{}", "b__default_partition.json": "[]"}, None,
         "has two files named default_partition.json"),
        ({"a__default_partition.json": "0123456789" * 99}, flipped, "is no readable archive"),
        ({"a__default_partition.json": "{}"}, encrypted, "is no readable archive"),
        ({"a__default_partition.json": "{}"}, lambda path: path.write_bytes(b"PK"), "is no readable archive"),
    ],
)  # fmt: skip
def test_archives_that_are_none_leave_nothing(tmp_path, members, damage, words):
    path = packed(tmp_path / "set.zip", **members)
    if damage:
        damage(path)
    with pytest.raises(UserError, match=f"set.zip {words}"):
        download._unpack(path, tmp_path / "sets/set")
    assert path.exists()
    assert list((tmp_path / "sets").iterdir()) == []


def test_a_partition_that_is_not_there_is_refused_when_fetched(geobench_root, params):
    params = dataclasses.replace(params, geobench_dir=str(geobench_root))
    wrong = DatasetConfig("geobench", options={"set": "m-so2sat", "partition": "0.1x"})
    with pytest.raises(UserError, match="no .*0.1x_partition.json. Partitions there: .*default"):
        geobench.fetch(wrong, params)


def test_a_plan_counts_what_is_there_and_leaves_out_what_may_be(geobench_root, params, tmp_path):
    folder = tmp_path / "m-so2sat"
    shutil.copytree(geobench_root / "classification_v1.0/m-so2sat", folder)
    listed = json.loads((folder / "default_partition.json").read_text())
    (folder / "mine_partition.json").write_text(json.dumps(listed | {"train": listed["train"][:2]}))
    (folder / "id_0000.hdf5").write_bytes(b"")
    here, nowhere = (dataclasses.replace(params, geobench_dir=str(root)) for root in (tmp_path, tmp_path / "none"))
    options = {"set": "m-so2sat", "partition": "mine"}
    with pytest.raises(UserError, match="id_0000.hdf5 cannot be read"):
        geobench.estimate_size(DatasetConfig("geobench", options=options), here)
    wanted, there = geobench.estimate_size(DatasetConfig("geobench", options=options | {"skip_bad": True}), here)
    assert (wanted.samples, there) == (10, 0)
    assert wanted.images_per_second > 0
    for partition, train in (("mine", 19992), ("0.01x_train", 200)):
        wanted, there = geobench.estimate_size(
            DatasetConfig("geobench", options=options | {"partition": partition}), nowhere
        )
        assert wanted.samples == train + sum(geobench.SETS["m-so2sat"].split_sizes[1:])
        assert there > 1e9
