"""Every damaged byte is found, and nothing else is reported."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from small_store import layout, write

from cache import checksums
from cache.errors import StoreError
from cache.reader import FeatureStore
from cache.schema import consolidate_metadata
from cache.verify import verify
from cache.writer import write_skipped

ROOT = Path(__file__).parents[2]


def command(path):
    return subprocess.run(
        [sys.executable, "-m", "cache.verify", path], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    write(folder, layout(samples=40, shard=16, codec="zstd", views=("identity", "flip_x")))
    return folder / "store.zarr"


def test_the_account_of_a_whole_store(store):
    ended = command(store)
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout
    assert "whole" in said
    assert "contract 2" in said
    assert "samples   40: test 14, train 26" in said
    assert re.search(r"level1    7x4x4, stride 8, stored with relative error 0\.0002\d? \(b\)", said)
    assert "views     identity, flip_x" in said
    assert "backbone: b" in said


def test_a_flipped_bit_in_any_of_a_hundred_places_is_found(store):
    files = [path for path in sorted(store.rglob("*")) if path.is_file()]
    sizes = np.array([path.stat().st_size for path in files])
    generator = np.random.default_rng(0)
    # Half of them anywhere, half of them in a file drawn first, so that the small ones have their share.
    chosen = [*generator.choice(len(files), 50, p=sizes / sizes.sum()), *generator.integers(0, len(files), 50)]
    found = 0
    for number in chosen:
        path, name = files[number], files[number].relative_to(store).as_posix()
        whole = bytearray(path.read_bytes())
        damaged = whole.copy()
        damaged[generator.integers(0, len(whole))] ^= 1 << generator.integers(0, 8)
        path.write_bytes(damaged)
        try:
            verify(store)
        except StoreError as error:
            # A line of the list itself that no longer reads may name any file.
            found += name in str(error) or name == checksums.NAME
        finally:
            path.write_bytes(whole)
    assert found == 100
    verify(store)


def test_the_command_names_the_first_bad_shard(store):
    paths = [store / "level0/features/c.1.0.0.0.0", store / "level1/features/c.0.0.0.0.0"]
    whole = [path.read_bytes() for path in paths]
    for path, content in zip(paths, whole, strict=True):
        path.write_bytes(content[:-1])
    ended = command(store)
    for path, content in zip(paths, whole, strict=True):
        path.write_bytes(content)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: level0/features/c.1.0.0.0.0 of")
    assert "Traceback" not in ended.stderr


def test_what_is_missing_and_what_does_not_belong(store):
    shard = store / "level0/features/c.1.0.0.0.0"
    aside = shard.rename(store.parent / "aside")
    with pytest.raises(StoreError, match=r"c.1.0.0.0.0 is listed in SHA256SUMS but is not in"):
        verify(store)
    aside.rename(shard)
    (store / "extra").write_text("x")
    with pytest.raises(StoreError, match="extra of .* is not listed"):
        verify(store)
    (store / "extra").unlink()
    listing = (store / checksums.NAME).rename(store.parent / "aside")
    with pytest.raises(StoreError, match="is missing or damaged, so nothing"):
        verify(store)
    listing.rename(store / checksums.NAME)
    with pytest.raises(StoreError, match="There is no store at"):
        verify(store / "nothing")


def test_an_unfinished_store_whose_sums_are_right_is_refused(tmp_path):
    write(tmp_path, stop_after=1)
    unfinished = tmp_path / "scratch/store.zarr"
    checksums.write(unfinished, {})
    with pytest.raises(StoreError, match="never finished"):
        verify(unfinished)


def test_a_listed_shard_that_lacks_rows_is_refused(tmp_path):
    """Right sums, wrong content: a writer other than ours."""
    write(tmp_path)
    array = zarr.open_group(tmp_path / "store.zarr", mode="r+", use_consolidated=False)["level1/features"]
    array[64:128] = np.nan  # zarr-python leaves out chunks that are all fill value
    (tmp_path / "store.zarr" / checksums.NAME).unlink()
    checksums.write(tmp_path / "store.zarr", {})
    with pytest.raises(StoreError, match=r"level1/features/c.1.0.0.0"):
        verify(tmp_path / "store.zarr")


def rewrite(folder, change):
    """A store as a careless writer would leave it: the change, and sums that fit it."""
    write(folder, layout(codec="int8"))
    root = zarr.open_group(folder / "store.zarr", mode="r+", use_consolidated=False)
    change(root)
    (folder / "store.zarr" / checksums.NAME).unlink()
    consolidate_metadata(root)
    checksums.write(folder / "store.zarr", {})
    return folder / "store.zarr"


@pytest.mark.parametrize("path", ["split", "pooled", "level0/mean", "level1/scale", "level1/y", "level0/features"])
def test_what_the_contract_asks_for_must_be_there(tmp_path, path):
    def remove(root):
        del root[path]

    with pytest.raises(StoreError):
        verify(rewrite(tmp_path, remove))


@pytest.mark.parametrize(
    "change",
    [
        {"codec": "zstd"},
        {"dtype": "float64"},
        {"content_sha256": "0" * 64},
        {"backbone": "another"},
        {"contract": "1"},
    ],
    ids=str,
)
def test_what_the_store_says_must_be_so(tmp_path, change):
    verify(rewrite(tmp_path / "right", lambda root: None))
    with pytest.raises(StoreError):
        verify(rewrite(tmp_path / "wrong", lambda root: root.attrs.update(change)))


def test_the_sums_are_those_of_sha256sum(store):
    ended = subprocess.run(["sha256sum", "-c", "--quiet", checksums.NAME], cwd=store, check=False)
    assert ended.returncode == 0


def test_a_left_out_store_is_whole(tmp_path):
    write_skipped(tmp_path / "x.zarr", tmp_path / "scratch", "needs nir")
    assert "needs nir" in verify(tmp_path / "x.zarr")


def test_a_reader_checks_when_asked(store):
    FeatureStore(store, verify=True)
    shard = store / "level1/features/c.2.0.0.0.0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"x")
    try:
        FeatureStore(store)
        with pytest.raises(StoreError, match="level1/features/c.2"):
            FeatureStore(store, verify=True)
    finally:
        shard.write_bytes(whole)
