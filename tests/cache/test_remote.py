"""Stores that are not a local folder, through the same interface."""

import http.server
import shutil
import threading
from functools import partial

import dvc.repo
import fsspec
import numpy as np
import pytest
from dvc.api import DVCFileSystem
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from small_store import all_values, open_store, small_schema, write_store
from zarr.storage import FsspecStore

from cache.errors import StoreError
from cache.reader import FeatureStore
from tests.errors import raises

INDEX = np.array([149, 0, 64, 63, 7, 149])


@pytest.fixture
def address(tmp_path):
    """tmp_path over HTTP, from a server without range requests, which serves whole files only."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("codec", "views"), [("zstd", ("identity", "flip_x")), ("int8", ())])
def test_read_over_http_and_from_memory_equals_local(tmp_path, address, codec, views):
    local = open_store(tmp_path, small_schema(codec=codec, views=views))
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "store.zarr"), f"/{tmp_path.name}", recursive=True)
    view = views[-1] if views else None
    for location in (f"{address}/store.zarr", f"memory://{tmp_path.name}"):
        remote = FeatureStore(location)
        assert remote.levels == local.levels
        for name in ("level0/features", "pooled/mean_level1"):
            np.testing.assert_array_equal(remote.read(name, INDEX, view), local.read(name, INDEX, view))
    with raises(StoreError, f"{address}/missing.zarr"):
        FeatureStore(f"{address}/missing.zarr")


def test_read_from_a_dvc_repository_without_a_checkout(tmp_path):
    write_store(tmp_path)
    (tmp_path / "work").mkdir()
    repository = dvc.repo.Repo.init(tmp_path / "work", no_scm=True)
    shutil.move(tmp_path / "store.zarr", tmp_path / "work/store.zarr")
    repository.add(str(tmp_path / "work/store.zarr"))
    shutil.rmtree(tmp_path / "work/store.zarr")
    files = AsyncFileSystemWrapper(DVCFileSystem(str(tmp_path / "work")), asynchronous=True)
    remote = FeatureStore(FsspecStore(files, read_only=True, path="store.zarr"))
    expected = all_values(small_schema(), "level1/features").astype("float16")[INDEX]
    np.testing.assert_array_equal(remote.read("level1/features", INDEX), expected)
