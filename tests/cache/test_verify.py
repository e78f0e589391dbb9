"""Every damaged byte is found, and nothing else is reported."""

import re
import shutil
import subprocess
from contextlib import contextmanager

import numpy as np
import pytest
import zarr
from small_store import small_schema, write_store

from cache import checksums
from cache.errors import StoreError
from cache.reader import FeatureStore
from cache.schema import CONTRACT, consolidate_metadata
from cache.verify import main, verify
from tests.errors import raises

SHARD = "level0/features/c.1.0.0.0.0"


@contextmanager
def changed(path, content=None):
    """Give a file another content, or delete it, and restore it at the end."""
    whole = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    yield
    path.write_bytes(whole)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    write_store(folder, small_schema(samples=40, shard_size=16, codec="zstd", views=("identity", "flip_x")))
    return folder / "store.zarr"


def test_command_with_a_whole_store_prints_a_summary(store, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cache.verify", str(store)])
    main()
    summary = capsys.readouterr().out
    assert re.search(rf"contract {CONTRACT}\b", summary)
    assert re.search(r"samples +40: test 14, train 26", summary)
    assert re.search(r"level1 +7x4x4, .*\b8\b.*\b0\.0002\d? \(b\)", summary)
    assert re.search(r"views +identity, flip_x", summary)
    assert "backbone: b" in summary


def test_every_flipped_byte_of_a_small_folder_is_found(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(f"content of {name}".encode())
    checksums.write(tmp_path, {})
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for index in range(len(whole)):
            damaged = whole[:index] + bytes([whole[index] ^ 1 << index % 8]) + whole[index + 1 :]
            with changed(path, damaged), pytest.raises(StoreError) as info:
                checksums.check(tmp_path)
            # A damaged line of the list itself may name any file.
            assert info.value.value == path.name or path.name == checksums.NAME
    checksums.check(tmp_path)


def test_verify_finds_a_flipped_bit_in_every_file(store):
    generator = np.random.default_rng(0)
    for path in [path for path in sorted(store.rglob("*")) if path.is_file() and path.name != checksums.NAME]:
        damaged = bytearray(path.read_bytes())
        damaged[generator.integers(0, len(damaged))] ^= 1 << generator.integers(0, 8)
        with changed(path, damaged), raises(StoreError, value=path.relative_to(store).as_posix(), path=store):
            verify(store)
    verify(store)
    process = subprocess.run(["sha256sum", "-c", "--quiet", checksums.NAME], cwd=store, check=False)
    assert process.returncode == 0


def test_command_names_the_first_damaged_shard(store, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cache.verify", str(store)])
    with changed(store / SHARD, b"damaged"), changed(store / "level1/features/c.0.0.0.0.0", b"damaged"):
        with pytest.raises(SystemExit) as info:
            main()
        FeatureStore(store)  # opening compares checksums only on request
        with raises(StoreError, value=SHARD, path=store):
            FeatureStore(store, verify=True)
    assert str(info.value).startswith(f"error: {SHARD}")
    FeatureStore(store, verify=True)


def test_verify_finds_missing_and_unlisted_files(store):
    with changed(store / SHARD), raises(StoreError, checksums.NAME, value=SHARD, path=store):
        verify(store)
    (store / "extra").write_text("x")
    with raises(StoreError, checksums.NAME, value="extra", path=store):
        verify(store)
    (store / "extra").unlink()
    with changed(store / checksums.NAME), raises(StoreError, value=checksums.NAME, path=store):
        verify(store)
    with raises(StoreError, path=store / "missing"):
        verify(store / "missing")


def test_verify_refuses_missing_rows_arrays_and_changed_attributes_with_right_checksums(tmp_path):
    write_store(tmp_path, small_schema(samples=8, shard_size=4, codec="int8"))
    store = tmp_path / "changed"

    def change(action):
        """Change a copy of the store, and write checksums that match the change."""
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(tmp_path / "store.zarr", store)
        root = zarr.open_group(store, mode="r+", use_consolidated=False)
        action(root)
        (store / checksums.NAME).unlink()
        consolidate_metadata(root)
        checksums.write(store, {})

    change(lambda root: None)
    verify(store)
    # zarr-python skips chunks that are all fill value.
    for name, value in (("level1/features", 0), ("level1/scale", np.nan)):
        change(lambda root, name=name, value=value: root[name].__setitem__(slice(4, 8), value))
        with raises(StoreError, path=store) as info:
            verify(store)
        assert info.value.value.startswith(f"{name}/c.1.")
    for name in ("split", "pooled", "level0/mean", "level1/scale", "level1/y", "level0/features"):
        change(lambda root, name=name: root.__delitem__(name))
        with pytest.raises(StoreError):
            verify(store)
    for attribute in ({"codec": "zstd"}, {"dtype": "float64"}, {"backbone": "another"}, {"contract": "2"}):
        change(lambda root, attribute=attribute: root.attrs.update(attribute))
        with pytest.raises(StoreError):
            verify(store)
