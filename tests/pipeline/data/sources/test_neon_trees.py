"""The NEON trees source: chips, masks and boxes."""

import dataclasses

import numpy as np

from pipeline.data.sources import neon_trees
from pipeline.errors import UserError
from tests.errors import raises


def test_prepare_counts_of_chips_and_classes(image_dataset):
    chips, tiles = image_dataset("sample-trees"), image_dataset("sample-trees-seg")
    assert chips.image.shape == (1302, 3, 64, 64)
    assert np.bincount(chips.label).tolist() == [598, 704]
    assert tiles.image.shape == (88, 3, 256, 256)
    assert set(np.unique(tiles.label)) == {0, 1}


def test_box_mask_fills_the_boxes_and_refuses_those_outside(raw_folder):
    path = raw_folder("neon_trees") / "2019_YELL_2_528000_4978000_image_crop2.xml"
    mask = neon_trees.box_mask(path, (2472, 2299))
    # The first box of the file: x 681 to 699, y 369 to 386.
    assert mask[369:386, 681:699].all()
    assert 0.15 < mask.mean() < 0.25
    path = raw_folder("neon_trees") / "2019_YELL_2_541000_4977000_image_crop.xml"
    with raises(UserError, key="bndbox", path=path):
        neon_trees.box_mask(path, (1249, 1035))  # swapped


def test_prepare_multilabel_or_a_folder_without_images_is_refused(tmp_path, params):
    dataset = params.dataset("sample-trees")
    with raises(UserError, key="task", value="multilabel", allowed=("classification", "segmentation")):
        neon_trees.prepare(tmp_path, dataclasses.replace(dataset, task="multilabel"))
    with raises(UserError, key="chip", path=tmp_path):
        neon_trees.prepare(tmp_path, dataset)
