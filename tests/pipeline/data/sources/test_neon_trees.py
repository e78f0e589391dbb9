import numpy as np
import pytest

from pipeline.data.sources import neon_trees
from pipeline.errors import UserError


def test_counts(image_dataset):
    chips, tiles = image_dataset("sample-trees"), image_dataset("sample-trees-seg")
    assert chips.image.shape == (1302, 3, 64, 64)
    assert np.bincount(chips.label).tolist() == [598, 704]
    assert tiles.image.shape == (88, 3, 256, 256)
    assert set(np.unique(tiles.label)) == {0, 1}


def test_boxes_are_filled_where_the_file_says(raw_folder):
    path = raw_folder("neon_trees") / "2019_YELL_2_528000_4978000_image_crop2.xml"
    mask = neon_trees.box_mask(path, (2472, 2299))
    # The file's first box: x 681 to 699, y 369 to 386.
    assert mask[369:386, 681:699].all()
    assert 0.15 < mask.mean() < 0.25


def test_swapped_axes_are_refused(raw_folder):
    with pytest.raises(UserError, match="lies outside"):
        neon_trees.box_mask(raw_folder("neon_trees") / "2019_YELL_2_541000_4977000_image_crop.xml", (1249, 1035))


def test_a_question_the_source_cannot_answer(raw_folder, params):
    import dataclasses

    with pytest.raises(UserError, match="classification or segmentation"):
        neon_trees.prepare(raw_folder("neon_trees"), dataclasses.replace(params.dataset("sample-trees"), task="multilabel"))
