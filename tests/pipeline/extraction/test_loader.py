"""Batches of images: parallel reads equal serial ones, and no batch crosses an edge."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pipeline.data import image_store
from pipeline.data.augmentation import VIEWS
from pipeline.extraction import loader

SOME_VIEWS = ("identity", "flip_x", "rot90")


@pytest.fixture
def images(images_path):
    """72 real tiles whose store states ten images per file."""
    images = image_store.open_images(images_path("sample-landuse-seg"))
    images.image.encoding["preferred_chunks"] = {"sample": 10}
    return images


@pytest.mark.parametrize(
    ("views", "rows"), [((), (0, 20)), ((), (13, 31)), (SOME_VIEWS, (60, 72)), (SOME_VIEWS, (70, 72))]
)
def test_image_loader_reads_rows_across_files(images, make_encoder, rows, views):
    encoder = make_encoder(images, "efficientnet", "lite0", 64)
    with ThreadPoolExecutor(4) as readers:
        loaded = loader.ImageLoader(images, encoder, views, readers)(slice(*rows))
    selected = encoder.preprocessor.select_bands(images.image[slice(*rows)].values)
    for view, actual in zip(views or ("identity",), loaded.images, strict=True):
        assert torch.equal(actual, torch.from_numpy(np.ascontiguousarray(VIEWS[view](selected))))


def test_image_loader_reads_a_file_once_for_the_batches_within_it(images, make_encoder, monkeypatch):
    encoder, read = make_encoder(images, "efficientnet", "lite0", 64), []
    read_file = loader.ImageLoader._read_file_uncached
    monkeypatch.setattr(
        loader.ImageLoader, "_read_file_uncached", lambda self, number: read.append(number) or read_file(self, number)
    )
    with ThreadPoolExecutor(1) as readers:
        image_loader = loader.ImageLoader(images, encoder, (), readers)
        for start in range(0, 72, 4):
            image_loader(slice(start, start + 4))
    assert read == list(range(8))


def test_batch_slices_end_where_labels_begin_or_end():
    is_unlabelled = np.zeros(20, bool)
    is_unlabelled[7:12] = True
    assert list(loader.batch_slices(slice(0, 20), 6, is_unlabelled)) == [
        slice(0, 6), slice(6, 7), slice(7, 12), slice(12, 18), slice(18, 20),
    ]  # fmt: skip
