"""Writing and resuming: whole shards, the same bytes, nothing silent."""

import json
import shutil
import threading

import numpy as np
import pytest
from small_store import content, layout, values, write

from cache.read import Features
from cache.schema import StoreError
from cache.write import Writer


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


@pytest.mark.parametrize("step", ["cache.write.publish", "cache.write.consolidate", "cache.checksums.write"])
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
    writers = [Writer(tmp_path / "scratch", described) for _ in range(2)]
    first, second = (writer.shards() for writer in writers)
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
    assert writers[0].finish(tmp_path / "store.zarr", {"backbone": "b"}) == alone
    assert writers[1].finish(tmp_path / "store.zarr", {"backbone": "b"}) == alone
    assert list(writers[1].shards()) == []


def test_a_shard_in_dead_hands_is_taken_over(tmp_path):
    described = layout()
    hands, other = (Writer(tmp_path / "scratch", described) for _ in range(2))
    held = hands.shards()
    assert next(held) == 0
    rest = other.shards()
    assert [next(rest), next(rest)] == [1, 2]
    held.close()  # as its process' death would
    assert next(rest) in (0, 1, 2)


def test_another_layout_is_refused(tmp_path):
    Writer(tmp_path / "scratch", layout())
    with pytest.raises(StoreError, match="holds the beginning of a store with another layout"):
        Writer(tmp_path / "scratch", layout(shard=32))


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
    large["level0/features"][9, 1, 2, 2] = -80000
    with pytest.raises(StoreError, match=r"2 values of level0/features are too large for float16 \(up to 8e\+04"):
        writer.write(0, large)
    assert writer.pending() == [0, 1, 2]
    large["level0/features"][3, 1, 2, 2:4] = np.inf, np.nan
    large["level0/features"][9, 1, 2, 2] = -np.inf
    writer.write(0, large)
    assert writer.pending() == [1, 2]


def test_underflow_is_reported(tmp_path):
    writer = Writer(tmp_path / "scratch", layout())
    faint = values(layout(), 0)
    faint["level1/features"] *= 1e-7
    with pytest.raises(StoreError, match=r"Most values of level1/features \(100%\) are too small for float16"):
        writer.write(0, faint)


def test_wrong_shards_are_refused(tmp_path):
    writer = Writer(tmp_path / "scratch", layout())
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
        writer = Writer(tmp_path / name, described)
        writer.write(0, values(described, 0))
        return writer.finish(tmp_path / f"{name}.zarr", said)

    assert len({digest("a", bands=["red"]), digest("b", bands=["nir"]), digest("c", bands=["nir"])}) == 2
    assert json.loads((tmp_path / "a.zarr/zarr.json").read_text())["attributes"]["complete"] is True
