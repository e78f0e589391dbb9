"""Writing and resuming: whole shards, the same bytes, nothing silent."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from small_store import content, layout, values, write

import cache.writer
from cache.errors import StoreError
from cache.reader import FeatureStore
from cache.verify import verify
from cache.writer import Writer


def new_writer(folder, described=None, **provenance):
    return Writer(folder / "scratch", described or layout(), folder / "store.zarr", provenance or {"backbone": "b"})


def test_resumed_and_unbroken_runs_give_the_same_bytes(tmp_path):
    digest = write(tmp_path / "unbroken")
    assert write(tmp_path / "broken", stop_after=2) is None
    assert not (tmp_path / "broken/store.zarr").exists()
    store = tmp_path / "broken/scratch/store.zarr"
    (store / "level0/features/c.2.0.0.0.123.partial").write_text("torn by a kill")
    (store / "level0/features/c.2.0.0.0").write_text("written, but not recorded")
    assert write(tmp_path / "broken") == digest
    assert content(tmp_path / "broken/store.zarr") == content(tmp_path / "unbroken/store.zarr")
    assert not (tmp_path / "broken/scratch").exists()


STEPS = ["cache.writer.publish", "cache.writer.consolidate_metadata", "cache.checksums.write"]


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_while_finishing_changes_no_byte(tmp_path, monkeypatch, step):
    def die(*_):
        raise KeyboardInterrupt

    write(tmp_path / "unbroken")
    write(tmp_path / "broken", stop_after=0)  # the store is laid down
    with monkeypatch.context() as patched:
        patched.setattr(step, die)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "broken")
    write(tmp_path / "broken")
    assert content(tmp_path / "broken/store.zarr") == content(tmp_path / "unbroken/store.zarr")


def test_two_writers_share_a_store_and_the_second_to_finish_gets_its_digest(tmp_path):
    alone = write(tmp_path / "alone", layout(shard=10))
    described = layout(shard=10)
    writers = [new_writer(tmp_path, described) for _ in range(2)]
    first, second = (writer.claim_shards() for writer in writers)
    mine, theirs = next(first), next(second)
    assert mine != theirs
    writers[0].write(mine, values(described, mine))
    writers[1].write(theirs, values(described, theirs))
    written = [[mine], [theirs]]

    def work(number, shards):
        for shard in shards:
            writers[number].write(shard, values(described, shard))
            written[number].append(shard)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(written[0] + written[1]) == list(range(15))
    assert writers[0].finish() == alone
    assert writers[1].finish() == alone
    assert list(writers[1].claim_shards()) == []
    late = new_writer(tmp_path, described)
    assert late.pending_shards() == list(late.claim_shards()) == []
    assert late.finish() == alone
    assert not (tmp_path / "scratch").exists()


def test_a_shard_in_dead_hands_is_taken_over(tmp_path):
    described = layout()
    hands, other = (new_writer(tmp_path, described) for _ in range(2))
    held = hands.claim_shards()
    assert next(held) == 0
    rest = other.claim_shards()
    assert [next(rest), next(rest)] == [1, 2]
    held.close()  # as its process' death would
    assert next(rest) in (0, 1, 2)


def test_another_layout_is_refused(tmp_path):
    new_writer(tmp_path)
    with pytest.raises(StoreError, match="holds the beginning of a store with another layout or provenance"):
        new_writer(tmp_path, layout(shard=32))
    with pytest.raises(StoreError, match="holds the beginning of a store with another layout or provenance"):
        new_writer(tmp_path, backbone="c")


def test_an_unfinished_store_is_never_taken_for_a_finished_one(tmp_path):
    write(tmp_path, stop_after=2)
    with pytest.raises(StoreError, match="no feature store"):
        FeatureStore(tmp_path / "store.zarr")
    shutil.copytree(tmp_path / "scratch/store.zarr", tmp_path / "store.zarr")
    with pytest.raises(StoreError, match="never finished"):
        FeatureStore(tmp_path / "store.zarr")
    shutil.rmtree(tmp_path / "store.zarr")
    with pytest.raises(StoreError, match=r"Shards \[2\]"):
        new_writer(tmp_path).finish()


def test_overflow_is_reported_and_infinities_pass(tmp_path):
    writer, described = new_writer(tmp_path), layout()
    large = values(described, 0)
    large["level0/features"][3, 1, 2, 2] = 70000
    large["level0/features"][9, 1, 2, 2] = -80000
    with pytest.raises(StoreError, match=r"2 values of level0/features are too large for float16 \(up to 8e\+04"):
        writer.write(0, large)
    assert writer.pending_shards() == [0, 1, 2]
    large["level0/features"][3, 1, 2, 2:4] = np.inf, np.nan
    large["level0/features"][9, 1, 2, 2] = -np.inf
    writer.write(0, large)
    assert writer.pending_shards() == [1, 2]


def test_underflow_is_reported(tmp_path):
    writer = new_writer(tmp_path)
    faint = values(layout(), 0)
    faint["level1/features"] *= 1e-7
    with pytest.raises(StoreError, match=r"Most values of level1/features \(100%\) are too small for float16"):
        writer.write(0, faint)


def test_wrong_shards_are_refused(tmp_path):
    writer = new_writer(tmp_path)
    with pytest.raises(StoreError, match="has the arrays"):
        writer.write(0, {"level0/features": np.zeros((64, 5, 8, 8))})
    for change in (lambda array: array[:10], lambda array: array[:, :2]):
        wrong = values(layout(), 0)
        wrong["pooled/mean_level0"] = change(wrong["pooled/mean_level0"])
        with pytest.raises(StoreError, match=r"wanted \{.*'pooled/mean_level0': \(64, 5\)"):
            writer.write(0, wrong)


def test_provenance_decides_the_digest(tmp_path):
    def digest(name, **said):
        described = layout(samples=8)
        writer = Writer(tmp_path / name, described, tmp_path / f"{name}.zarr", said)
        writer.write(0, values(described, 0))
        return writer.finish()

    assert len({digest("a", bands=["red"]), digest("b", bands=["nir"]), digest("c", bands=["nir"])}) == 2
    assert json.loads((tmp_path / "a.zarr/zarr.json").read_text())["attributes"]["complete"] is True


def test_what_was_measured_is_told_and_decides_no_digest(tmp_path):
    def digest(name, measured):
        described = layout(samples=8)
        writer = Writer(tmp_path / name, described, tmp_path / f"{name}.zarr", {"backbone": "b"})
        writer.write(0, values(described, 0))
        return writer.finish(measured)

    found = {"precision_error": {"level0": 0.01}}
    assert digest("told", found) == digest("plain", None)
    assert FeatureStore(tmp_path / "told.zarr").attributes["measurements"] == found
    assert "measured: {'precision_error': {'level0': 0.01}}" in verify(tmp_path / "told.zarr")


@pytest.mark.parametrize("levels", [True, False])
def test_a_kill_after_publishing_leaves_the_store_and_nothing_to_do(tmp_path, monkeypatch, levels):
    """The scratch folder still has every record then, and no store."""

    def die(self):
        raise KeyboardInterrupt

    described = layout() if levels else dataclasses.replace(layout(), levels=())
    digest = write(tmp_path / "unbroken", described)
    with monkeypatch.context() as patched:
        patched.setattr(Writer, "_remove_scratch", die)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "broken", described)
    whole = content(tmp_path / "broken/store.zarr")
    writer = new_writer(tmp_path / "broken", described)
    assert writer.pending_shards() == []
    assert writer.finish() == digest
    assert content(tmp_path / "broken/store.zarr") == whole == content(tmp_path / "unbroken/store.zarr")
    # Deleted, it is written again in full, whatever records a kill left behind.
    (tmp_path / "broken/scratch/shards").mkdir(parents=True)
    (tmp_path / "broken/scratch/shards/0.json").write_text("{}")
    shutil.rmtree(tmp_path / "broken/store.zarr")
    assert new_writer(tmp_path / "broken", described).pending_shards() == [0, 1, 2]
    assert write(tmp_path / "broken", described) == digest


@pytest.mark.parametrize("file", ["level1/features/c.1.0.0.0", "pooled/mean_level0/zarr.json", "SHA256SUMS"])
def test_a_finished_store_that_lost_a_file_is_written_again(tmp_path, file):
    digest = write(tmp_path)
    whole = content(tmp_path / "store.zarr")
    assert new_writer(tmp_path).pending_shards() == []
    (tmp_path / "store.zarr" / file).unlink()
    assert new_writer(tmp_path).pending_shards() == [0, 1, 2]
    assert write(tmp_path) == digest
    assert content(tmp_path / "store.zarr") == whole


def test_another_store_at_the_final_name_is_replaced(tmp_path):
    first = write(tmp_path)
    second = write(tmp_path, layout(codec="zstd"))
    assert first != second
    assert FeatureStore(tmp_path / "store.zarr", verify=True).attributes["codec"] == "zstd"


def test_bytes_are_safe_before_their_record_and_the_record_before_the_next_shard(tmp_path, monkeypatch):
    """The order of flushes, which no kill of a process can show."""
    writer, done, fsync = new_writer(tmp_path), [], os.fsync

    def flushed(number):
        path = os.readlink(f"/proc/self/fd/{number}")
        done.append(path.removeprefix(f"{tmp_path}/scratch/"))
        fsync(number)

    monkeypatch.setattr(os, "fsync", flushed)
    writer.write(0, values(layout(), 0))

    def first(start):
        return next(number for number, path in enumerate(done) if path.startswith(start))

    record = first("shards/0.json")
    for name in layout().array_names():
        assert first(f"store.zarr/{name}/c.0") < done.index(f"store.zarr/{name}") < record
    assert done[-1] == "shards"


def test_a_store_without_training_samples(tmp_path):
    described = dataclasses.replace(layout(), split=("test",) * 150)
    write(tmp_path, described)
    mean, std = FeatureStore(tmp_path / "store.zarr").statistics("level0")
    assert np.isnan(mean).all()
    assert np.isnan(std).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"split": ("train",)}, "150 samples and 1 splits"),
        ({"sample": ("a",) * 150}, "sample has 'a' more than once"),
        ({"views": ("identity", "identity")}, "views has 'identity' more than once"),
        ({"split": ("",) * 150}, "or its split, is empty"),
        ({"dtype": "float64"}, "dtype is 'float64'; features are stored as float16 or float32"),
        ({"shard_size": 0}, "must be at least 1"),
        ({"sample": (), "split": ()}, "0 samples"),
    ],
)
def test_layouts_that_make_no_store(change, said):
    with pytest.raises(StoreError, match=said):
        dataclasses.replace(layout(), **change)


def test_the_loss_does_not_depend_on_the_number_of_threads(tmp_path):
    """A dot product's last digits do, and would make two runs differ."""
    script = (
        "import sys; from pathlib import Path; from small_store import layout, write; "
        "write(Path(sys.argv[1]), layout(samples=64, codec='bitround4'))"
    )
    here = Path(__file__).parent
    for threads in "12":
        extra = {"OPENBLAS_NUM_THREADS": threads, "PYTHONPATH": f"{here.parents[1]}:{here}"}
        command = [sys.executable, "-c", script, tmp_path / threads]
        subprocess.run(command, check=True, env=os.environ | extra)
    assert content(tmp_path / "1/store.zarr") == content(tmp_path / "2/store.zarr")


def test_a_shard_that_is_taken_while_another_thread_lets_go_is_let_go(tmp_path, monkeypatch):
    writer, held = new_writer(tmp_path), []

    def slow(path):
        lock = take(path)
        if not held:
            writer.release()  # by another thread, between the look and the lock
        held.append(lock)
        return lock

    take = cache.writer.try_lock
    monkeypatch.setattr("cache.writer.try_lock", slow)
    assert list(writer.claim_shards()) == [0]
    assert not writer._claimed
