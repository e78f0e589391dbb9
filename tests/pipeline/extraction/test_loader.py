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


@pytest.mark.parametrize("views", [(), SOME_VIEWS])
@pytest.mark.parametrize("rows", [(0, 20), (20, 50), (60, 72), (13, 31), (70, 72)])
def test_image_loader_reads_the_same_in_parallel_and_serially(images, make_encoder, rows, views):
    encoder = make_encoder(images, "efficientnet", "lite0", 64)
    with ThreadPoolExecutor(4) as readers:
        image_loader = loader.ImageLoader(images, encoder, views, readers)
        parallel, serial = image_loader._read_in_parallel(slice(*rows)), image_loader._read_serially(slice(*rows))
    selected = encoder.preprocessor.select_bands(images.image[slice(*rows)].values)
    for view, from_parallel, from_serial in zip(views or ("identity",), parallel, serial, strict=True):
        expected = torch.from_numpy(np.ascontiguousarray(VIEWS[view](selected)))
        assert torch.equal(from_parallel, expected)
        assert torch.equal(from_serial, expected)


def test_make_reader_returns_the_stores_rows_in_any_order(images):
    read, expected = loader.make_reader(images), images.image.values
    for first, last in [(3, 7), (7, 23), (0, 10), (8, 12), (65, 72), (40, 60), (69, 72), (3, 4)]:
        assert np.array_equal(read(slice(first, last)), expected[first:last])


def test_make_reader_reads_a_file_once_for_the_batches_within_it(images, monkeypatch):
    read = loader.make_reader(images)
    first = read(slice(20, 24))
    monkeypatch.setattr(type(images.image), "__getitem__", None)
    assert np.array_equal(read(slice(20, 24)), first)
    assert len(read(slice(24, 29))) == 5
    with pytest.raises(TypeError):
        read(slice(29, 31))


def test_chunk_slices_are_files_if_rows_begin_with_one():
    assert loader.chunk_slices(slice(20, 47), 10) == [slice(20, 30), slice(30, 40), slice(40, 47)]
    assert loader.chunk_slices(slice(25, 47), 10) == [slice(25, 47)]


def test_batch_slices_end_where_labels_begin_or_end():
    is_unlabelled = np.zeros(20, bool)
    is_unlabelled[7:12] = True
    assert list(loader.batch_slices(slice(0, 20), 6, is_unlabelled)) == [
        slice(0, 6), slice(6, 7), slice(7, 12), slice(12, 18), slice(18, 20),
    ]  # fmt: skip
