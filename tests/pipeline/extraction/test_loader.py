"""Batches of images: many threads give a GPU what one gives a processor, and nothing reaches over an edge."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pipeline.data import image_store
from pipeline.data.augmentation import VIEWS
from pipeline.extraction import loader

VIEWED = ("identity", "flip_x", "rot90")


@pytest.fixture
def images(images_path):
    """72 real tiles whose store says that its files have ten."""
    found = image_store.open_images(images_path("sample-landuse-seg"))
    found.image.encoding["preferred_chunks"] = {"sample": 10}
    return found


@pytest.mark.parametrize("views", [(), VIEWED])
@pytest.mark.parametrize("rows", [(0, 20), (20, 50), (60, 72), (13, 31), (70, 72)])
def test_many_threads_read_what_one_reads(images, make_encoder, rows, views):
    sealed = make_encoder(images, "efficientnet", "lite0", 64)
    with ThreadPoolExecutor(4) as readers:
        made = loader.ImageLoader(images, sealed, views, readers)
        many, one = made._by_many(slice(*rows)), made._by_one(slice(*rows))
    selected = sealed.inputs.select(images.image[slice(*rows)].values)
    for view, by_many, by_one in zip(views or ("identity",), many, one, strict=True):
        wanted = torch.from_numpy(np.ascontiguousarray(VIEWS[view](selected)))
        assert torch.equal(by_many, wanted)
        assert torch.equal(by_one, wanted)


def test_rows_in_any_order_are_the_stores(images):
    read, everything = loader.reader(images), images.image.values
    for first, last in [(3, 7), (7, 23), (0, 10), (8, 12), (65, 72), (40, 60), (69, 72), (3, 4)]:
        assert np.array_equal(read(slice(first, last)), everything[first:last])


def test_a_file_is_read_once_for_the_batches_within_it(images, monkeypatch):
    read = loader.reader(images)
    first = read(slice(20, 24))
    monkeypatch.setattr(type(images.image), "__getitem__", None)
    assert np.array_equal(read(slice(20, 24)), first)
    assert len(read(slice(24, 29))) == 5
    with pytest.raises(TypeError):
        read(slice(29, 31))


def test_pieces_are_files_where_rows_begin_with_one():
    assert loader.chunk_slices(slice(20, 47), 10) == [slice(20, 30), slice(30, 40), slice(40, 47)]
    assert loader.chunk_slices(slice(25, 47), 10) == [slice(25, 47)]


def test_batches_end_where_labels_begin_or_end():
    apart = np.zeros(20, bool)
    apart[7:12] = True
    assert list(loader.batch_slices(slice(0, 20), 6, apart)) == [
        slice(0, 6), slice(6, 7), slice(7, 12), slice(12, 18), slice(18, 20),
    ]  # fmt: skip
