import copy
import dataclasses
import threading
import time

import numpy as np
import pytest
import torch

from cache.reader import FeatureStore
from cache.writer import Writer
from pipeline.backbones import get_spec
from pipeline.config import BackboneConfig, ExtractConfig
from pipeline.data import image_store as images
from pipeline.extraction import engine

EXTRACT = ExtractConfig(
    dtype="float16", codec="none", precision="float32", compiled=False, batch=10, shard=16, keep_levels=False,
    views=("identity",),
)  # fmt: skip
BACKBONE = BackboneConfig("efficientnet", "lite0", "random", 64)


class Counting:
    """An encoder that counts its images and stops as if pulled out of the wall."""

    def __init__(self, encoder, limit=10**9):
        self.encoder, self.inputs, self.device = encoder, encoder.inputs, "cpu"
        self.seen, self.limit, self.lock = 0, limit, threading.Lock()

    def twin(self):
        twin = copy.copy(self)
        twin.encoder, twin.count = self.encoder.twin(), self.count
        return twin

    def count(self, images):
        with self.lock:
            if self.seen >= self.limit:
                raise KeyboardInterrupt
            self.seen += images

    def forward(self, batch, context):
        self.count(len(batch))
        return self.encoder.forward(batch, context)


@pytest.fixture
def run(images_path, tmp_path, make_encoder):
    """Extract tiles with an untrained network into a named folder; returns the store's digest."""
    opened = images.open_images(images_path("sample-landuse-seg"))
    sealed, declared = make_encoder(opened, "efficientnet", "lite0", 64), get_spec(BACKBONE)
    pyramid = sealed(opened.image[:1].values)

    def extract(name, limit=10**9, described=EXTRACT):
        counting = Counting(sealed, limit)
        said = engine.provenance(
            opened, "lite0", BACKBONE, declared, sealed.inputs, {"weights": "random"}, described, "cpu"
        )
        layout = engine.make_layout(opened, declared, pyramid, 64, described)
        scratch = engine.working_dir(tmp_path / name / "scratch", said, described)
        writer = Writer(scratch, layout, tmp_path / name / "store.zarr", said)
        try:
            engine.extract(opened, counting, writer, described.batch)
        finally:
            writer.release()
        return writer.finish(), counting.seen

    extract.sealed, extract.images, extract.folder = sealed, opened, tmp_path
    return extract


def test_every_sample_lands_in_its_own_row(run):
    run("a")
    features = FeatureStore(run.folder / "a/store.zarr")
    for row in (0, 15, 16, 40, 71):
        alone = run.sealed(run.images.image[row : row + 1].values)
        np.testing.assert_allclose(
            features.read("level3/features", [row]),
            alone.levels[3],
            rtol=2e-3,
            atol=2e-3 * np.abs(alone.levels[3]).max(),
        )
        np.testing.assert_allclose(
            features.read("pooled/mean_level3", [row]), alone.pooled["mean_level3"], rtol=5e-3, atol=1e-3
        )
    assert features.sample.tolist() == run.images.sample.values.tolist()
    assert features.split.tolist() == run.images.split.values.tolist()


@pytest.fixture
def threads():
    """Sets torch's number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_broken_extraction_goes_on_where_it_stopped(run, threads):
    threads(2)
    whole, seen = run("a")
    assert seen == 72
    threads(1)  # batch after batch, so that it is known which was the last
    with pytest.raises(KeyboardInterrupt):
        run("b", limit=40)
    threads(2)
    assert not (run.folder / "b/store.zarr").exists()
    resumed, seen = run("b")
    assert resumed == whole
    assert seen == 72 - 32  # two shards of 16 were safe


def test_a_kill_while_two_batches_are_encoded_changes_no_byte(run, threads):
    threads(2)
    whole, _ = run("a")
    with pytest.raises(KeyboardInterrupt):
        run("b", limit=40)
    resumed, seen = run("b")
    assert resumed == whole
    assert seen < 72


def test_one_thread_or_two_give_the_same_bytes(run, threads):
    """Two encode two batches side by side, each by itself."""
    digests = set()
    for count in (1, 2):
        threads(count)
        digests.add(run(f"{count}")[0])
        assert torch.get_num_threads() == count
    assert len(digests) == 1


def test_other_inputs_start_afresh_and_clear_the_old_scratch(run):
    with pytest.raises(KeyboardInterrupt):
        run("a", limit=40)
    wide = dataclasses.replace(EXTRACT, dtype="float32")
    _, seen = run("a", described=wide)
    assert seen == 72
    assert list((run.folder / "a/scratch").iterdir()) == []


def test_classification_sets_keep_pooled_vectors_alone_unless_asked(images_path, run):
    chips = images.open_images(images_path("sample-landuse"))
    pyramid = run.sealed(chips.image[:1].values)
    assert engine.make_layout(chips, get_spec(BACKBONE), pyramid, 64, EXTRACT).levels == ()
    dense = engine.make_layout(chips, get_spec(BACKBONE), pyramid, 64, dataclasses.replace(EXTRACT, keep_levels=True))
    assert [level.stride for level in dense.levels] == [4, 8, 16, 32]


def test_views_are_encoded_and_not_turned_afterwards(run):
    run("a", described=dataclasses.replace(EXTRACT, views=("identity", "flip_x", "rot90")))
    features = FeatureStore(run.folder / "a/store.zarr")
    assert features.view == ["identity", "flip_x", "rot90"]
    image = run.images.image[20:21].values
    for view, turned in (("identity", image), ("flip_x", image[..., ::-1]), ("rot90", np.rot90(image, 1, (2, 3)))):
        alone = run.sealed(np.ascontiguousarray(turned))
        read = features.read("level1/features", [20], view)
        np.testing.assert_allclose(read, alone.levels[1], rtol=2e-3, atol=2e-3 * np.abs(alone.levels[1]).max())
        pooled = features.read("pooled/mean_level3", [20], view)
        np.testing.assert_allclose(pooled, alone.pooled["mean_level3"], rtol=2e-3, atol=2e-3)
    identity, flipped = (features.read("level1/features", [20], view) for view in ("identity", "flip_x"))
    assert np.abs(flipped[..., ::-1].astype("float32") - identity).max() > 0.01 * np.abs(identity).max()


def test_the_codec_of_params_is_the_stores(run):
    run("a", described=dataclasses.replace(EXTRACT, codec="int8"))
    features = FeatureStore(run.folder / "a/store.zarr")
    assert features.attributes["codec"] == "int8"
    assert 0 < features.root["level0"].attrs["relative_error"] < 0.05


def test_a_failing_disk_ends_the_run_with_its_own_error(run, monkeypatch):
    monkeypatch.setattr(Writer, "write", lambda *given: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        run("a")


def test_an_image_that_cannot_be_read_ends_it_while_batches_wait(run, images_path, tmp_path, make_encoder):
    """The last batch of a shard still waits for its turn when the reader fails: nobody may wait for it for ever."""
    opened = images.open_images(images_path("sample-landuse-seg"))
    sealed = make_encoder(opened, "efficientnet", "lite0", 64)

    class Slow(Counting):
        def forward(self, batch, context):
            time.sleep(0.3)
            return super().forward(batch, context)

    def read(rows):
        if rows.start >= 32:  # where a shard begins
            raise OSError("gone")
        return opened.image[rows].values

    layout = engine.make_layout(opened, get_spec(BACKBONE), sealed(opened.image[:1].values), 64, EXTRACT)
    writer, ended = Writer(tmp_path / "scratch", layout, tmp_path / "store.zarr", {}), []

    def work():
        with pytest.raises(OSError, match="gone"):
            engine.extract(opened, Slow(sealed), writer, 4)
        ended.append(True)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine.feed, "reader", lambda _: read)
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(30)
    assert ended, "it hangs"
