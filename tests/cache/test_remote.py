"""Stores that are not a local folder, by the same interface."""

import http.server
import shutil
import threading
from functools import partial

import fsspec
import numpy as np
import pytest
from dvc.api import DVCFileSystem
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from small_store import everything, layout, write
from zarr.storage import FsspecStore

from cache.errors import StoreError
from cache.reader import FeatureStore

INDEX = np.array([149, 0, 64, 63, 7, 149])


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
    local = FeatureStore(tmp_path / "store.zarr")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "store.zarr"), f"/{tmp_path.name}", recursive=True)
    view = views[-1] if views else None
    for address in (f"{served}/store.zarr", f"memory://{tmp_path.name}"):
        remote = FeatureStore(address)
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
    remote = FeatureStore(FsspecStore(files, read_only=True, path="store.zarr"))
    expected = everything(layout(), "level1/features").astype("float16")[INDEX]
    np.testing.assert_array_equal(remote.read("level1/features", INDEX), expected)


def test_an_address_with_nothing_behind_it(tmp_path, served):
    with pytest.raises(StoreError, match="cannot be opened"):
        FeatureStore(f"{served}/nothing.zarr")
