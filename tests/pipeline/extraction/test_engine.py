import copy
import dataclasses
import errno
import threading
import time

import numpy as np
import pytest
import torch

from cache.reader import FeatureStore
from cache.writer import Writer
from pipeline.backbones import get_spec
from pipeline.config import BackboneConfig, ExtractConfig
from pipeline.data import image_store
from pipeline.extraction import engine
from tests.errors import raises

EXTRACT = ExtractConfig(
    dtype="float16", codec="none", precision="float32", compiled=False, batch=10, shard=16, keep_levels=False,
    views=("identity",),
)  # fmt: skip
BACKBONE = BackboneConfig("efficientnet", "lite0", "random", 64)
N_SAMPLES = 72


class CountingEncoder:
    """An encoder that counts its images, and raises KeyboardInterrupt after a number of them."""

    def __init__(self, encoder, limit=10**9):
        self.encoder, self.preprocessor, self.device = encoder, encoder.preprocessor, "cpu"
        self.n_images, self.limit, self.lock = 0, limit, threading.Lock()

    def clone_sharing_weights(self):
        clone = copy.copy(self)
        clone.encoder, clone.count = self.encoder.clone_sharing_weights(), self.count
        return clone

    def count(self, n_images):
        with self.lock:
            if self.n_images >= self.limit:
                raise KeyboardInterrupt
            self.n_images += n_images

    def forward(self, batch, metadata):
        self.count(len(batch))
        return self.encoder.forward(batch, metadata)


class SlowEncoder(CountingEncoder):
    def forward(self, batch, metadata):
        time.sleep(0.3)
        return super().forward(batch, metadata)


@pytest.fixture
def images(images_path):
    return image_store.open_images(images_path("sample-landuse-seg"))


@pytest.fixture
def encoder(images, make_encoder):
    return make_encoder(images, "efficientnet", "lite0", 64)


@pytest.fixture
def extract_to(images, encoder, tmp_path):
    """Function that extracts into a named folder; returns the digest and the number of encoded images."""
    spec, pyramid = get_spec(BACKBONE), encoder(images.image[:1].values)

    def extract(name, limit=10**9, config=EXTRACT):
        counting = CountingEncoder(encoder, limit)
        provenance = engine.provenance(
            images, "lite0", BACKBONE, spec, encoder.preprocessor, {"weights": "random"}, config, "cpu"
        )
        schema = engine.make_schema(images, spec, pyramid, 64, config)
        scratch = engine.working_dir(tmp_path / name / "scratch", provenance, config)
        writer = Writer(scratch, schema, tmp_path / name / "store.zarr", provenance)
        try:
            engine.extract(images, counting, writer, config.batch)
        finally:
            writer.release()
        return writer.finish(), counting.n_images

    return extract


@pytest.fixture
def set_threads():
    """Sets torch's number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_extract_writes_every_sample_to_its_own_row(extract_to, images, encoder, tmp_path):
    extract_to("a")
    features = FeatureStore(tmp_path / "a/store.zarr")
    for row in (0, 15, 16, 40, 71):
        alone = encoder(images.image[row : row + 1].values)
        np.testing.assert_allclose(
            features.read("level3/features", [row]),
            alone.levels[3],
            rtol=2e-3,
            atol=2e-3 * np.abs(alone.levels[3]).max(),
        )
        np.testing.assert_allclose(
            features.read("pooled/mean_level3", [row]), alone.pooled["mean_level3"], rtol=5e-3, atol=1e-3
        )
    assert features.sample.tolist() == images.sample.values.tolist()
    assert features.split.tolist() == images.split.values.tolist()


def test_extract_interrupted_resumes_at_the_first_missing_shard(extract_to, set_threads, tmp_path):
    set_threads(2)
    digest, n_images = extract_to("a")
    assert n_images == N_SAMPLES
    set_threads(1)  # one batch at a time, so that the last one is certain
    with pytest.raises(KeyboardInterrupt):
        extract_to("b", limit=40)
    set_threads(2)
    assert not (tmp_path / "b/store.zarr").exists()
    resumed_digest, n_images = extract_to("b")
    assert resumed_digest == digest
    assert n_images == N_SAMPLES - 32  # two shards of 16 were finished


def test_extract_interrupted_during_two_parallel_batches_writes_the_same_bytes(extract_to, set_threads):
    set_threads(2)
    digest, _ = extract_to("a")
    with pytest.raises(KeyboardInterrupt):
        extract_to("b", limit=40)
    resumed_digest, n_images = extract_to("b")
    assert resumed_digest == digest
    assert n_images < N_SAMPLES


def test_extract_with_one_or_two_threads_writes_the_same_bytes(extract_to, set_threads):
    """Two threads encode two batches in parallel, one each."""
    digests = set()
    for n_threads in (1, 2):
        set_threads(n_threads)
        digests.add(extract_to(str(n_threads))[0])
        assert torch.get_num_threads() == n_threads
    assert len(digests) == 1


def test_working_dir_of_other_inputs_is_new_and_deletes_the_old(extract_to, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        extract_to("a", limit=40)
    _, n_images = extract_to("a", config=dataclasses.replace(EXTRACT, dtype="float32"))
    assert n_images == N_SAMPLES
    assert list((tmp_path / "a/scratch").iterdir()) == []


def test_make_schema_of_a_classification_set_has_levels_only_with_keep_levels(images_path, encoder):
    images, spec = image_store.open_images(images_path("sample-landuse")), get_spec(BACKBONE)
    pyramid = encoder(images.image[:1].values)
    assert engine.make_schema(images, spec, pyramid, 64, EXTRACT).levels == ()
    schema = engine.make_schema(images, spec, pyramid, 64, dataclasses.replace(EXTRACT, keep_levels=True))
    assert [level.stride for level in schema.levels] == [4, 8, 16, 32]


def test_provenance_describes_inputs_in_plain_names(images, encoder):
    provenance = engine.provenance(
        images, "lite0", BACKBONE, get_spec(BACKBONE), encoder.preprocessor, {"weights": "random"}, EXTRACT, "cpu"
    )
    assert provenance["bands"] == provenance["input_names"] == ["red", "green", "blue"]
    assert provenance["normalisation"] == {
        "input_units": "display",
        "image_units": "dn",
        "display_range": (0.0, 0.3),
        "statistics": "native",
        "mean": (0.498, 0.498, 0.498),
        "std": (0.502, 0.502, 0.502),
    }
    assert provenance["metadata_inputs"] == []


def test_extract_encodes_views_instead_of_flipping_features(extract_to, images, encoder, tmp_path):
    extract_to("a", config=dataclasses.replace(EXTRACT, views=("identity", "flip_x", "rot90")))
    features = FeatureStore(tmp_path / "a/store.zarr")
    assert features.view == ["identity", "flip_x", "rot90"]
    image = images.image[20:21].values
    for view, viewed in (("identity", image), ("flip_x", image[..., ::-1]), ("rot90", np.rot90(image, 1, (2, 3)))):
        alone = encoder(np.ascontiguousarray(viewed))
        level = features.read("level1/features", [20], view)
        np.testing.assert_allclose(level, alone.levels[1], rtol=2e-3, atol=2e-3 * np.abs(alone.levels[1]).max())
        pooled = features.read("pooled/mean_level3", [20], view)
        np.testing.assert_allclose(pooled, alone.pooled["mean_level3"], rtol=2e-3, atol=2e-3)
    identity, flipped = (features.read("level1/features", [20], view) for view in ("identity", "flip_x"))
    assert np.abs(flipped[..., ::-1].astype("float32") - identity).max() > 0.01 * np.abs(identity).max()


def test_extract_with_a_codec_stores_its_error(extract_to, tmp_path):
    extract_to("a", config=dataclasses.replace(EXTRACT, codec="int8"))
    features = FeatureStore(tmp_path / "a/store.zarr")
    assert features.attributes["codec"] == "int8"
    assert 0 < features.root["level0"].attrs["relative_error"] < 0.05


def test_extract_on_a_full_disk_raises_the_disks_error(extract_to, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(Writer, "write", fail)
    with raises(OSError, errno=errno.ENOSPC):
        extract_to("a")


def test_extract_with_an_unreadable_image_ends_while_batches_wait(images, encoder, tmp_path, monkeypatch):
    """The last batch of a shard still waits when the reader fails; nothing may wait for it forever."""

    def read(rows):
        if rows.start >= 32:  # the first row of a shard
            raise OSError("unreadable")
        return images.image[rows].values

    schema = engine.make_schema(images, get_spec(BACKBONE), encoder(images.image[:1].values), 64, EXTRACT)
    writer, errors = Writer(tmp_path / "scratch", schema, tmp_path / "store.zarr", {}), []

    def extract():
        try:
            engine.extract(images, SlowEncoder(encoder), writer, 4)
        except OSError as error:
            errors.append(error)

    monkeypatch.setattr(engine.loader, "make_reader", lambda _: read)
    thread = threading.Thread(target=extract, daemon=True)
    thread.start()
    thread.join(60)
    assert [str(error) for error in errors] == ["unreadable"]
