"""Writing, resuming and reading feature stores, with real features where values matter."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import xarray as xr

from cache.read import Features, aligned
from cache.schema import Layout, Level, StoreError
from cache.write import Writer, write_left_out

SAMPLES = 150


def layout(dtype="float16", samples=SAMPLES, shard=64):
    return Layout(
        sample=tuple(f"s{i:03d}" for i in range(samples)),
        split=tuple("train" if i % 3 else "test" for i in range(samples)),
        levels=(Level(5, 8, 8, 4, "a"), Level(7, 4, 4, 8, "b")),
        pooled={"mean_level0": 5, "mean_level1": 7},
        dtype=dtype,
        shard=shard,
    )


def values(described, shard, seed=0):
    rows = described.rows(shard)
    generator = np.random.default_rng([seed, shard])
    shapes = {"level0/features": (5, 8, 8), "level1/features": (7, 4, 4)}
    shapes |= {"pooled/mean_level0": (5,), "pooled/mean_level1": (7,)}
    return {
        name: generator.normal(size=(rows.stop - rows.start, *shape)).astype("float32")
        for name, shape in shapes.items()
    }


def write(folder, described=None, stop_after=None):
    described = described or layout()
    writer = Writer(folder / "scratch", described)
    for done, shard in enumerate(writer.pending()):
        if done == stop_after:
            writer._lock.close()
            return None
        writer.write(shard, values(described, shard))
    return writer.finish(folder / "store.zarr", {"backbone": "b"})


def content(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_the_store_is_a_datatree_with_named_dimensions(tmp_path):
    write(tmp_path)
    tree = xr.open_datatree(tmp_path / "store.zarr", engine="zarr")
    assert tree["level0"].features.dims == ("sample", "channel", "y", "x")
    assert tree["level0"].features.dtype == np.float16
    assert tree["level1"].attrs["stride"] == 8
    assert set(tree.coords) == {"sample", "split"}
    assert tree["level1"].sample.values.tolist()[:2] == ["s000", "s001"]
    assert tree["pooled"].mean_level1.shape == (SAMPLES, 7)
    lazy = xr.open_zarr(tmp_path / "store.zarr", group="level0", chunks={})
    assert lazy.features.chunks[0][0] in (1, 64)
    expected = np.concatenate([values(layout(), shard)["level0/features"] for shard in range(3)]).astype("float16")
    np.testing.assert_array_equal(tree["level0"].features, expected)


def test_one_file_a_shard(tmp_path):
    write(tmp_path)
    files = [path for path in (tmp_path / "store.zarr/level0/features").rglob("*") if path.name != "zarr.json"]
    assert len([path for path in files if path.is_file()]) == 3


def test_training_statistics(tmp_path):
    write(tmp_path)
    features = Features(tmp_path / "store.zarr")
    mean, std = features.statistics("level0")
    training = features.read("level0/features", np.flatnonzero(features.split == "train")).astype(np.float64)
    np.testing.assert_allclose(mean, training.mean(axis=(0, 2, 3)), atol=1e-12)
    np.testing.assert_allclose(std, training.std(axis=(0, 2, 3)), atol=1e-12)


def test_rows_come_in_the_order_asked_for(tmp_path):
    write(tmp_path)
    features = Features(tmp_path / "store.zarr")
    index = np.array([149, 0, 64, 63, 7, 149])
    everything = features.read("pooled/mean_level1", np.arange(SAMPLES))
    np.testing.assert_array_equal(features.read("pooled/mean_level1", index), everything[index])
    np.testing.assert_array_equal(
        features.read("level1/features", index), features.read("level1/features", np.arange(SAMPLES))[index]
    )


def test_resumed_and_unbroken_runs_give_the_same_bytes(tmp_path):
    digest = write(tmp_path / "unbroken")
    assert write(tmp_path / "broken", stop_after=2) is None
    assert not (tmp_path / "broken/store.zarr").exists()
    log = tmp_path / "broken/scratch/shards.jsonl"
    log.write_text(log.read_text() + '{"shard": 2, "sha2')  # torn by a kill
    (tmp_path / "broken/scratch/store.zarr/level0/features/c/2.partial").write_text("torn")
    assert write(tmp_path / "broken") == digest
    assert content(tmp_path / "broken/store.zarr") == content(tmp_path / "unbroken/store.zarr")
    assert not (tmp_path / "broken/scratch").exists()


def test_a_kill_just_before_publishing_changes_no_byte(tmp_path, monkeypatch):
    write(tmp_path / "unbroken")

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("cache.write.publish", die)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "broken")
    gc.collect()  # closes the lock, as the kill would
    write(tmp_path / "broken")
    assert content(tmp_path / "broken/store.zarr") == content(tmp_path / "unbroken/store.zarr")


def test_underflow_is_reported(tmp_path):
    writer = Writer(tmp_path / "scratch", layout())
    faint = values(layout(), 0)
    faint["level1/features"] *= 1e-7
    with pytest.raises(StoreError, match="Most values of level1/features are too small for float16"):
        writer.write(0, faint)


SLOW_WRITER = """
import sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
from test_store import layout, values
from cache.write import Writer
folder = Path(sys.argv[1])
described = layout(samples=640, shard=16)
writer = Writer(folder / "scratch", described)
print("ready", flush=True)
for shard in writer.pending():
    writer.write(shard, values(described, shard))
writer.finish(folder / "store.zarr", {{"backbone": "b"}})
"""


def test_kill_9_at_random_moments(tmp_path):
    from pathlib import Path

    here = Path(__file__).parent
    script = tmp_path / "writer.py"
    script.write_text(SLOW_WRITER.format(paths=[str(here), str(here.parents[1])]))

    def start(folder):
        process = subprocess.Popen([sys.executable, script, folder], stdout=subprocess.PIPE)
        process.stdout.readline()
        return process

    folder = tmp_path / "unbroken"
    begun = time.monotonic()
    assert start(folder).wait() == 0
    whole = time.monotonic() - begun
    kills, generator = 0, np.random.default_rng(0)
    folder = tmp_path / "broken"
    while not (folder / "store.zarr").exists():
        process = start(folder)
        time.sleep(generator.uniform(0, whole / 4))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        if (folder / "store.zarr").exists():
            Features(folder / "store.zarr")
        assert kills < 100
    assert kills >= 2
    assert content(folder / "store.zarr") == content(tmp_path / "unbroken/store.zarr")


def test_two_writers_of_one_store(tmp_path):
    first = Writer(tmp_path / "scratch", layout())
    with pytest.raises(StoreError, match="Another process is writing"):
        Writer(tmp_path / "scratch", layout())
    first._lock.close()


def test_an_unfinished_store_is_never_taken_for_a_finished_one(tmp_path):
    write(tmp_path, stop_after=2)
    with pytest.raises(StoreError, match="no feature store"):
        Features(tmp_path / "store.zarr")
    shutil.copytree(tmp_path / "scratch/store.zarr", tmp_path / "store.zarr")
    with pytest.raises(StoreError, match="never finished"):
        Features(tmp_path / "store.zarr")
    writer = Writer(tmp_path / "scratch", layout())
    with pytest.raises(StoreError, match=r"Shards \[2\]"):
        writer.finish(tmp_path / "other.zarr", {})


def test_overflow_is_reported_and_infinities_pass(tmp_path):
    writer, described = Writer(tmp_path / "scratch", layout()), layout()
    large = values(described, 0)
    large["level0/features"][3, 1, 2, 2] = 70000
    with pytest.raises(StoreError, match=r"1 values of level0/features are too large for float16 \(up to 7e\+04"):
        writer.write(0, large)
    large["level0/features"][3, 1, 2, 2:4] = np.inf, np.nan
    writer.write(0, large)
    assert writer.pending() == [1, 2]


def test_wrong_shards_are_refused(tmp_path):
    writer = Writer(tmp_path / "scratch", layout())
    with pytest.raises(StoreError, match="has arrays"):
        writer.write(0, {"level0/features": np.zeros((64, 5, 8, 8))})
    short = values(layout(), 0)
    short["pooled/mean_level0"] = short["pooled/mean_level0"][:10]
    with pytest.raises(StoreError, match="has 10 samples, not 64"):
        writer.write(0, short)


def test_misaligned_stores_are_refused(tmp_path):
    write(tmp_path / "a")
    swapped = layout()
    names = list(swapped.sample)
    names[4], names[5] = names[5], names[4]
    write(tmp_path / "b", Layout(**{**swapped.__dict__, "sample": tuple(names)}))
    a, b = Features(tmp_path / "a/store.zarr"), Features(tmp_path / "b/store.zarr")
    aligned([a, a])
    with pytest.raises(StoreError, match="differ in 'sample' at row 4: 's004' and 's005'"):
        aligned([a, b])


def test_a_left_out_store_says_why(tmp_path):
    write_left_out(tmp_path / "x.zarr", tmp_path / "scratch", "needs nir")
    with pytest.raises(StoreError, match="holds no features: needs nir"):
        Features(tmp_path / "x.zarr")
    assert xr.open_datatree(tmp_path / "x.zarr", engine="zarr").attrs["left_out"] == "needs nir"


def test_provenance_decides_the_digest(tmp_path):
    def digest(name, **said):
        described = layout(samples=8)
        writer = Writer(tmp_path / name, described)
        writer.write(0, values(described, 0))
        return writer.finish(tmp_path / f"{name}.zarr", said)

    assert len({digest("a", bands=["red"]), digest("b", bands=["nir"]), digest("c", bands=["nir"])}) == 2
    assert json.loads((tmp_path / "a.zarr/zarr.json").read_text())["attributes"]["complete"] is True
