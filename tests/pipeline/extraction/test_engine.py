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
BACKBONE = BackboneConfig("efficientnet", "lite0", "random", 32)
SPEC = get_spec(BACKBONE)
N_SAMPLES = 40


class CountingEncoder:
    """An encoder that waits, counts its images, and raises KeyboardInterrupt after a number of them."""

    def __init__(self, encoder, limit=10**9, seconds=0.0):
        self.encoder, self.preprocessor, self.device, self.seconds = encoder, encoder.preprocessor, "cpu", seconds
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
        time.sleep(self.seconds)
        self.count(len(batch))
        return self.encoder.forward(batch, metadata)


@pytest.fixture
def extract_to(images, encoder, pyramid, tmp_path):
    """Function that extracts into a named folder; returns the digest and the number of encoded images."""

    def extract(name, limit=10**9, config=EXTRACT):
        counting = CountingEncoder(encoder, limit)
        provenance = engine.provenance(
            images, "lite0", BACKBONE, SPEC, encoder.preprocessor, {"weights": "random"}, config, "cpu"
        )
        schema = engine.make_schema(images, SPEC, pyramid, 32, config)
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
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_extract_writes_every_sample_to_its_own_row(extract_to, images, encoder, tmp_path):
    extract_to("a")
    features = FeatureStore(tmp_path / "a/store.zarr")
    for row in (0, 15, 16, 39):
        alone = encoder(images.image[row : row + 1].values)
        level, atol = features.read("level3/features", [row]), 2e-3 * np.abs(alone.levels[3]).max()
        np.testing.assert_allclose(level, alone.levels[3], rtol=2e-3, atol=atol)
        pooled = features.read("pooled/mean_level3", [row])
        np.testing.assert_allclose(pooled, alone.pooled["mean_level3"], rtol=5e-3, atol=1e-3)
    assert features.sample.tolist() == images.sample.values.tolist()
    assert features.split.tolist() == images.split.values.tolist()
    attributes = features.attributes
    assert attributes["bands"] == attributes["input_names"] == ["red", "green", "blue"]
    normalisation = {"input_units": "display", "image_units": "dn", "display_range": [0.0, 0.3], "mean": [0.498] * 3}
    assert normalisation.items() <= attributes["normalisation"].items()


@pytest.mark.parametrize("n_threads", [1, 2])
def test_extract_interrupted_resumes_with_the_same_bytes(extract_to, set_threads, tmp_path, n_threads):
    """Two threads encode a batch each; with one thread, the last batch before the end is certain."""
    set_threads(3 - n_threads)
    digest, n_images = extract_to("a")
    assert (n_images, torch.get_num_threads()) == (N_SAMPLES, 3 - n_threads)
    set_threads(n_threads)
    with pytest.raises(KeyboardInterrupt):
        extract_to("b", limit=26)
    assert not (tmp_path / "b/store.zarr").exists()
    resumed_digest, n_images = extract_to("b")
    assert resumed_digest == digest
    if n_threads == 1:
        assert n_images == N_SAMPLES - 16  # one shard was finished
    else:
        assert n_images < N_SAMPLES


def test_working_dir_of_other_inputs_is_new_and_deletes_the_old(tmp_path):
    first = engine.working_dir(tmp_path, {"backbone": "a"}, EXTRACT)
    first.mkdir()
    assert engine.working_dir(tmp_path, {"backbone": "a"}, EXTRACT) == first
    assert first.exists()
    second = engine.working_dir(tmp_path, {"backbone": "a"}, dataclasses.replace(EXTRACT, dtype="float32"))
    assert second != first
    assert not first.exists()


def test_make_schema_of_a_classification_set_has_levels_only_with_keep_levels(images_path, pyramid):
    images = image_store.open_images(images_path("sample-landuse"))
    assert engine.make_schema(images, SPEC, pyramid, 32, EXTRACT).levels == ()
    schema = engine.make_schema(images, SPEC, pyramid, 32, dataclasses.replace(EXTRACT, keep_levels=True))
    assert [level.stride for level in schema.levels] == [4, 8, 16, 32]


def test_extract_encodes_views_and_stores_the_codecs_error(extract_to, images, encoder, tmp_path):
    views = {"identity": lambda image: image, "flip_x": lambda image: image[..., ::-1],
             "rot90": lambda image: np.rot90(image, 1, (2, 3))}  # fmt: skip
    extract_to("a", config=dataclasses.replace(EXTRACT, views=tuple(views), codec="int8"))
    features = FeatureStore(tmp_path / "a/store.zarr")
    assert features.view == list(views)
    assert features.attributes["codec"] == "int8"
    assert 0 < features.root["level0"].attrs["relative_error"] < 0.05
    levels = {view: features.read("level1/features", [20], view).astype("float32") for view in views}
    for view, transform in views.items():
        alone = encoder(np.ascontiguousarray(transform(images.image[20:21].values)))
        np.testing.assert_allclose(levels[view], alone.levels[1], atol=1e-2 * np.abs(alone.levels[1]).max())
        pooled = features.read("pooled/mean_level3", [20], view)
        np.testing.assert_allclose(pooled, alone.pooled["mean_level3"], rtol=2e-3, atol=2e-3)
    # A view's features are not the flipped features of the image.
    assert np.abs(levels["flip_x"][..., ::-1] - levels["identity"]).max() > 0.03 * np.abs(levels["identity"]).max()


def test_extract_on_a_full_disk_raises_the_disks_error(extract_to, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(Writer, "write", fail)
    with raises(OSError, errno=errno.ENOSPC):
        extract_to("a")


def test_extract_with_an_unreadable_image_ends_while_batches_wait(images, encoder, pyramid, tmp_path, monkeypatch):
    """The last batch of a shard still waits when the reader fails; nothing may wait for it forever."""
    read_file = engine.loader.ImageLoader._read_file_uncached

    def read(image_loader, number):
        if number >= 4:  # the first file of a shard
            raise OSError("unreadable")
        return read_file(image_loader, number)

    schema = engine.make_schema(images, SPEC, pyramid, 32, EXTRACT)
    writer, errors = Writer(tmp_path / "scratch", schema, tmp_path / "store.zarr", {}), []

    def extract():
        try:
            engine.extract(images, CountingEncoder(encoder, seconds=0.05), writer, 4)
        except OSError as error:
            errors.append(error)

    monkeypatch.setattr(engine.loader.ImageLoader, "_read_file_uncached", read)
    thread = threading.Thread(target=extract, daemon=True)
    thread.start()
    thread.join(60)
    assert [str(error) for error in errors] == ["unreadable"]
