"""Reading rows, wherever they lie."""

import dataclasses
import http.server
import os
import pickle
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr
from dvc.api import DVCFileSystem
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from small_store import SAMPLES, everything, layout, write
from zarr.storage import FsspecStore

from cache import rows
from cache.read import Features, aligned
from cache.schema import Layout, StoreError

INDEX = np.array([149, 0, 64, 63, 7, 149])
CODECS = ("none", "lz4", "zstd", "bitround6", "int8")


def through_zarr(path, name):
    """The whole array by zarr-python alone."""
    root = zarr.open_group(path, mode="r")
    values = root[name][:]
    if values.dtype == np.int8:
        values = (values * root[name.replace("features", "scale")][:][..., None, None]).astype(root.attrs["dtype"])
    return values


@pytest.mark.parametrize("views", [(), ("identity", "flip_x", "rot90")], ids=["plain", "views"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_are_those_that_zarr_python_reads(tmp_path, codec, dtype, views):
    write(tmp_path, layout(dtype=dtype, codec=codec, views=views))
    features = Features(tmp_path / "store.zarr")
    for name in ("level0/features", "level1/features", "pooled/mean_level1"):
        expected = through_zarr(tmp_path / "store.zarr", name)[INDEX]
        for number, view in enumerate(views or (None,)):
            read = features.read(name, INDEX, view)
            assert read.dtype == dtype
            np.testing.assert_array_equal(read, expected[:, number] if views else expected)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_every_value_of_a_lossless_codec_comes_back(tmp_path, dtype, codec):
    """Every float16 there is, NaNs' payloads and signed zeros included."""
    words = np.arange(2**16, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):
        given = words if dtype == "float16" else words.astype(np.float32) * np.float32(1.1)
    described = Layout(
        sample=tuple(f"s{i}" for i in range(64)), split=("train",) * 64, pooled={}, dtype=dtype, shard=64,
        levels=(layout().levels[0].__class__(16, 8, 8, 4, "a"),), codec=layout(codec=codec).codec,
    )  # fmt: skip
    maps = given.reshape(64, 16, 8, 8)
    with np.errstate(all="ignore"):
        write(tmp_path, described, given=lambda *_: {"level0/features": maps})
    read = Features(tmp_path / "store.zarr").read("level0/features", np.arange(64))
    assert read.tobytes() == maps.tobytes()


def test_rows_land_in_the_memory_given(tmp_path):
    write(tmp_path)
    features = Features(tmp_path / "store.zarr")
    fused = np.zeros((6, 12, 8, 8), "float16")
    assert features.read("level0/features", INDEX, out=fused[:, 4:9]) is not None
    np.testing.assert_array_equal(fused[:, 4:9], everything(layout(), "level0/features").astype("float16")[INDEX])
    assert not fused[:, :4].any()
    assert not fused[:, 9:].any()


def test_memory_that_does_not_fit_is_refused(tmp_path):
    write(tmp_path)
    features = Features(tmp_path / "store.zarr")
    for shape, dtype in (((6, 5, 8, 8), "float32"), ((6, 6, 8, 8), "float16"), ((5, 5, 8, 8), "float16")):
        with pytest.raises(StoreError, match=r"gives \(6, 5, 8, 8\) float16, each row contiguous; the memory given"):
            features.read("level0/features", INDEX, out=np.empty(shape, dtype))
    with pytest.raises(StoreError, match="each row contiguous"):
        features.read("level0/features", INDEX, out=np.empty((6, 8, 8, 5), "float16").transpose(0, 3, 1, 2))


def test_levels_are_in_the_order_of_their_numbers(tmp_path):
    level = layout().levels[1]
    write(tmp_path, dataclasses.replace(layout(), levels=(level,) * 12, pooled={}))
    assert Features(tmp_path / "store.zarr").levels == [f"level{number}" for number in range(12)]


def test_a_child_of_a_reading_process_can_read(tmp_path):
    """A lock that another thread held when the process was forked would stay held in the child."""
    write(tmp_path)
    features = Features(tmp_path / "store.zarr")
    with features._files.lock:
        child = os.fork()
        if not child:
            os._exit(0 if features.read("level0/features", [3]).shape == (1, 5, 8, 8) else 1)
    for _ in range(200):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child waits for a lock that no one holds")
    assert status == 0


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
    write(tmp_path, layout(shard=2))
    features = Features(tmp_path / "store.zarr")
    monkeypatch.setattr(rows, "_files_allowed", lambda: 6 * len(rows.Files._live))
    order = np.random.default_rng(0).permutation(SAMPLES)
    expected = everything(layout(shard=2), "level0/features").astype("float16")[order]
    np.testing.assert_array_equal(features.read("level0/features", order), expected)
    assert 1 <= sum(map(len, features._files.opened.values())) <= 6


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("length", [0, 3, 1000])
def test_a_cut_file_is_named(tmp_path, codec, length):
    write(tmp_path, layout(codec=codec))
    file = tmp_path / "store.zarr/level0/features/c.1.0.0.0"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(StoreError, match=r"level0/features/c.1.0.0.0 of .* is damaged.*cache.verify"):
        Features(tmp_path / "store.zarr").read("level0/features", [120])


def test_what_is_mapped_is_let_go(tmp_path):
    """Values are the same, and of the files' pages no more stay in the process than may."""
    write(tmp_path, layout(samples=3000, shard=500))
    features = Features(tmp_path / "store.zarr", mapped=100_000)
    order = np.random.default_rng(0).integers(0, 3000, 1000)
    expected = everything(layout(samples=3000, shard=500), "level0/features").astype("float16")[order]
    for start in range(0, 1000, 50):
        read = features.read("level0/features", order[start : start + 50])
        np.testing.assert_array_equal(read, expected[start : start + 50])
    features.read("level0/features", order[:2])
    lines, resident = Path("/proc/self/smaps").read_text().split("\n"), 0
    for number, line in enumerate(lines):
        if "level0/features/c." in line:
            resident += int(next(one for one in lines[number:] if one.startswith("Rss:")).split()[1]) * 1024
    size = sum(path.stat().st_size for path in (tmp_path / "store.zarr/level0/features").glob("c.*"))
    assert size > 1_900_000
    assert resident < size / 2  # two rows, and what the system maps around them


def test_a_missing_shard_is_an_error_and_not_nan(tmp_path):
    write(tmp_path)
    (tmp_path / "store.zarr/pooled/mean_level0/c.2.0").unlink()
    with pytest.raises(StoreError, match=r"pooled/mean_level0/c.2.0 is missing"):
        Features(tmp_path / "store.zarr").read("pooled/mean_level0", [140])


def test_a_store_replaced_while_it_is_read_is_noticed(tmp_path):
    write(tmp_path)
    features = Features(tmp_path / "store.zarr")
    features.read("level0/features", [0])
    shutil.rmtree(tmp_path / "store.zarr")
    write(tmp_path, seed=1)
    with pytest.raises(StoreError, match="or that store was replaced while it was read"):
        features.read("level0/features", [140])


def test_bad_requests_say_what_there_is(tmp_path):
    write(tmp_path, layout(views=("identity", "flip_x")))
    features = Features(tmp_path / "store.zarr")
    for index in ([150], [-1]):
        with pytest.raises(StoreError, match="has samples 0 to 149"):
            features.read("level0/features", index)
    with pytest.raises(StoreError, match="no array 'level7/features'; it has level0/features, level1"):
        features.read("level7/features", [0])
    with pytest.raises(StoreError, match=r"no view 'rot90'; it has \['identity', 'flip_x'\]"):
        features.read("level0/features", [0], view="rot90")
    with pytest.raises(StoreError, match=r"no split 'val'; it has \['test', 'train'\]"):
        features.rows("val")
    with pytest.raises(StoreError, match="no feature store at"):
        Features(tmp_path / "nothing.zarr")
    with pytest.raises(StoreError, match="no level 'level7'; it has level0, level1"):
        features.statistics("level7")
    with pytest.raises(StoreError, match="A mask becomes one by np.flatnonzero"):
        features.read("level0/features", features.split == "train")
    with pytest.raises(StoreError, match="A fraction of 0 was asked for"):
        features.rows("train", 0)


def test_another_contract_is_refused(tmp_path):
    write(tmp_path)
    metadata = tmp_path / "store.zarr/zarr.json"
    metadata.write_text(metadata.read_text().replace('"contract": "2"', '"contract": "3"'))
    with pytest.raises(StoreError, match="follows contract 3; this reader knows 2"):
        Features(tmp_path / "store.zarr")


def test_subsets_are_nested_and_depend_on_names_alone(tmp_path):
    write(tmp_path)
    features = Features(tmp_path / "store.zarr")
    train = features.rows("train")
    assert (features.split[train] == "train").all()
    tenth, half = features.rows("train", 0.1), features.rows("train", 0.5)
    assert (len(tenth), len(half), len(train)) == (10, 50, 100)
    assert set(tenth) < set(half) < set(train)
    assert set(features.rows("train", 0.1, seed=1)) != set(tenth)
    reordered = layout()
    names = list(reordered.sample)
    names[1], names[2] = names[2], names[1]
    write(tmp_path / "b", Layout(**{**reordered.__dict__, "sample": tuple(names)}))
    other = Features(tmp_path / "b/store.zarr")
    assert set(other.sample[other.rows("train", 0.5)]) == set(features.sample[half])


def test_misaligned_stores_are_refused(tmp_path):
    write(tmp_path / "a")
    swapped = layout()
    names = list(swapped.sample)
    names[4], names[5] = names[5], names[4]
    write(tmp_path / "b", Layout(**{**swapped.__dict__, "sample": tuple(names)}))
    write(tmp_path / "c", layout(samples=149))
    a, b, c = (Features(tmp_path / name / "store.zarr") for name in "abc")
    aligned([a, a])
    with pytest.raises(StoreError, match="differ in 'sample' at row 4: 's004' and 's005'"):
        aligned([a, b])
    with pytest.raises(StoreError, match="has 150 samples, .* has 149"):
        aligned([a, c])


def test_a_store_survives_pickling(tmp_path):
    write(tmp_path)
    features = pickle.loads(pickle.dumps(Features(tmp_path / "store.zarr")))
    assert features.read("level1/features", [3]).shape == (1, 7, 4, 4)


def test_reads_wait_for_the_disk_where_the_system_cannot_say_so(tmp_path, monkeypatch):
    """As on macOS, and on file systems without RWF_NOWAIT."""
    write(tmp_path)
    features = Features(tmp_path / "store.zarr")
    expected = features.read("level0/features", INDEX)
    monkeypatch.setattr(os, "RWF_NOWAIT", 1 << 30)  # a flag that no kernel knows
    np.testing.assert_array_equal(features.read("level0/features", INDEX), expected)
    monkeypatch.delattr(os, "RWF_NOWAIT")
    np.testing.assert_array_equal(features.read("level0/features", INDEX), expected)


# Stores that are not a local folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A web server without ranges, which knows only whole files."""

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """tmp_path over HTTP."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("codec", "views"), [("none", ()), ("zstd", ("identity", "flip_x")), ("int8", ())])
def test_over_http_and_in_memory_by_the_same_interface(tmp_path, served, codec, views):
    write(tmp_path, layout(codec=codec, views=views))
    local = Features(tmp_path / "store.zarr")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "store.zarr"), f"/{tmp_path.name}", recursive=True)
    view = views[-1] if views else None
    for address in (f"{served}/store.zarr", f"memory://{tmp_path.name}"):
        remote = Features(address)
        assert remote.levels == local.levels
        for name in ("level0/features", "pooled/mean_level1"):
            np.testing.assert_array_equal(remote.read(name, INDEX, view), local.read(name, INDEX, view))


def test_from_a_dvc_repository(tmp_path):
    """As a colleague reads a store that was pushed, without a checkout."""
    import dvc.repo

    write(tmp_path)
    (tmp_path / "work").mkdir()
    repository = dvc.repo.Repo.init(tmp_path / "work", no_scm=True)
    shutil.move(tmp_path / "store.zarr", tmp_path / "work/store.zarr")
    repository.add(str(tmp_path / "work/store.zarr"))
    shutil.rmtree(tmp_path / "work/store.zarr")
    files = AsyncFileSystemWrapper(DVCFileSystem(str(tmp_path / "work")), asynchronous=True)
    remote = Features(FsspecStore(files, read_only=True, path="store.zarr"))
    expected = everything(layout(), "level1/features").astype("float16")[INDEX]
    np.testing.assert_array_equal(remote.read("level1/features", INDEX), expected)


def test_an_address_with_nothing_behind_it(tmp_path, served):
    with pytest.raises(StoreError, match="cannot be opened"):
        Features(f"{served}/nothing.zarr")
