"""Reading images, estimating an extraction, and extracting."""

import copy
import dataclasses
import errno
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cache.reader import FeatureStore
from cache.writer import Writer
from pipeline.backbones import get_spec
from pipeline.backbones.encoder import Encoder
from pipeline.config import BackboneConfig, ExtractConfig
from pipeline.data import image_store
from pipeline.data.augmentation import VIEWS
from pipeline.errors import UserError
from pipeline.extraction import engine, estimate, loader
from tests.errors import raises

EXTRACT = ExtractConfig(
    dtype="float16", codec="none", precision="float32", compiled=False, batch=10, shard=16, keep_levels=False,
    views=("identity",),
)  # fmt: skip
BACKBONE = BackboneConfig("efficientnet", "lite0", "random", 32)
SPEC = get_spec(BACKBONE)
N_SAMPLES = 40
SOME_VIEWS = ("identity", "flip_x", "rot90")


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


@pytest.mark.parametrize(
    ("part", "method", "first"), [(loader.ImageLoader, "_read_file_uncached", 4), (Writer, "write", 0)]
)
def test_extract_with_a_broken_disk_ends_while_batches_wait(
    images, encoder, pyramid, tmp_path, monkeypatch, part, method, first
):
    """The last batch of a shard still waits when the reader fails; nothing may wait for it forever."""
    original = getattr(part, method)

    def fail(self, number, *args):
        if number >= first:  # the first file of a shard
            raise OSError(errno.ENOSPC, "No space left")
        return original(self, number, *args)

    schema = engine.make_schema(images, SPEC, pyramid, 32, EXTRACT)
    writer, errors = Writer(tmp_path / "scratch", schema, tmp_path / "store.zarr", {}), []

    def extract():
        try:
            engine.extract(images, CountingEncoder(encoder, seconds=0.05), writer, 4)
        except OSError as error:
            errors.append(error.errno)

    monkeypatch.setattr(part, method, fail)
    thread = threading.Thread(target=extract, daemon=True)
    thread.start()
    thread.join(60)
    assert errors == [errno.ENOSPC]


@pytest.mark.parametrize("codec", ["none", "zstd", "int8"])
def test_format_estimate_refuses_a_disk_that_is_too_small_before_anything_is_written(
    images, encoder, tmp_path, monkeypatch, codec
):
    def format_estimate(free_bytes, folder, result):
        monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: SimpleNamespace(free=round(free_bytes)))
        return estimate.format_estimate(schema, result, tmp_path / folder, "tiles x lite0")

    dry_run = dataclasses.replace(estimate.dry_run(images, encoder, 4), images_per_second=10.0)
    extract_config = dataclasses.replace(EXTRACT, codec=codec, views=("identity", "rot90"))
    schema = engine.make_schema(images, SPEC, dry_run.pyramid, 32, extract_config)
    writer = Writer(tmp_path / "scratch", schema, tmp_path / "store.zarr", {})
    engine.extract(images, encoder, writer, 10)
    finished = format_estimate(0.2 * estimate.nbytes(schema), "scratch", dry_run)
    assert "0.0 min" in finished
    assert "0.00 GB" in finished
    writer.finish()
    stored_bytes = sum(path.stat().st_size for path in (tmp_path / "store.zarr").rglob("c.*"))
    line = format_estimate(1.2 * stored_bytes, "new", dry_run)
    for text in ("tiles x lite0: 40 samples", "10.0 images/s", "0.1 min"):
        assert text in line
    with raises(UserError, "tiles x lite0", key="extract.codec", value=codec, path=tmp_path):
        format_estimate(0.8 * stored_bytes, "new", dry_run)
    assert not (tmp_path / "new").exists()
    dry_run.pyramid.levels[0] *= 1e9  # too large for float16, which is refused when they are stored
    format_estimate(1e12, "new", dry_run)


def test_dry_run_in_bfloat16_measures_the_difference_to_float32(images, encoder, monkeypatch):
    n_threads = torch.get_num_threads()
    result = estimate.dry_run(images, encoder, 4)
    assert result.precision_error == {}
    assert 0 < result.images_per_second < 1e5
    assert torch.get_num_threads() == n_threads
    lower_encoder = Encoder(encoder.preprocessor, encoder.network, "cpu", "bfloat16")
    lower = estimate.dry_run(images, lower_encoder, 4)
    assert list(lower.precision_error) == ["level0", "level1", "level2", "level3"]
    assert all(1e-4 < error < 0.3 for error in lower.precision_error.values())
    monkeypatch.setattr(estimate, "_MAX_PRECISION_ERROR", 1e-4)
    with raises(UserError, "%", key="extract.precision", value="bfloat16", allowed=("float32",)):
        estimate.dry_run(images, lower_encoder, 4)


def test_dry_run_of_a_network_that_does_not_work_on_the_images_is_refused(images, encoder):
    network = copy.deepcopy(encoder.network)
    next(network.parameters()).data.fill_(float("nan"))
    with raises(UserError, key="extract.precision", value="float32"):
        estimate.dry_run(images, Encoder(encoder.preprocessor, network, "cpu"), 4)
    with raises(UserError, 32, key="bands", value=("red", "green", "blue")):
        estimate.dry_run(images, Encoder(encoder.preprocessor, torch.nn.Conv2d(7, 3, 1), "cpu"), 4)


@pytest.mark.parametrize(
    ("maximum", "budget", "expected"), [(64, 1e9, 64), (48, 1e9, 32), (64, 160, 16), (64, 159, 8), (64, 1, 1)]
)
def test_largest_power_of_two_never_measures_a_batch_that_may_not_fit(maximum, budget, expected):
    """The search of `find_batch_size` on a GPU, without one."""
    measured = []

    def measure_bytes(batch):
        measured.append(batch)
        return 10 * batch

    assert estimate._largest_power_of_two(maximum, budget, measure_bytes) == expected
    assert max(measured) <= expected


@pytest.mark.parametrize(("views", "rows"), [((), (0, 16)), ((), (13, 31)), (SOME_VIEWS, (30, 40))])
def test_image_loader_reads_rows_across_files(images, encoder, rows, views):
    with ThreadPoolExecutor(4) as readers:
        loaded = loader.ImageLoader(images, encoder, views, readers)(slice(*rows))
    selected = encoder.preprocessor.select_bands(images.image[slice(*rows)].values)
    for view, actual in zip(views or ("identity",), loaded.images, strict=True):
        assert torch.equal(actual, torch.from_numpy(np.ascontiguousarray(VIEWS[view](selected))))


def test_image_loader_reads_a_file_once_for_the_batches_within_it(images, encoder, monkeypatch):
    read, read_file = [], loader.ImageLoader._read_file_uncached
    monkeypatch.setattr(
        loader.ImageLoader, "_read_file_uncached", lambda self, number: read.append(number) or read_file(self, number)
    )
    with ThreadPoolExecutor(1) as readers:
        image_loader = loader.ImageLoader(images, encoder, (), readers)
        for start in range(0, 40, 5):
            image_loader(slice(start, start + 5))
    assert read == list(range(5))


def test_batch_slices_end_where_labels_begin_or_end():
    is_unlabelled = np.zeros(20, bool)
    is_unlabelled[7:12] = True
    slices = list(loader.batch_slices(slice(0, 20), 6, is_unlabelled))
    assert slices == [slice(0, 6), slice(6, 7), slice(7, 12), slice(12, 18), slice(18, 20)]
