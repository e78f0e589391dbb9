from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pipeline.data.augmentation import VIEWS
from pipeline.extraction import loader

SOME_VIEWS = ("identity", "flip_x", "rot90")


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
