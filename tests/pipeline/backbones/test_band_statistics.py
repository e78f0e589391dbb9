from pathlib import Path

import numpy as np
import torch

from pipeline.backbones import create_backbone, get_spec
from pipeline.config import BackboneConfig


def test_band_statistics_are_of_cells_and_of_the_whole_chip():
    backbone = BackboneConfig("band_statistics", "mean_std", "none", 64)
    image = torch.rand(2, 3, 64, 64)
    pyramid = create_backbone(backbone, get_spec(backbone), None, Path())(image)
    assert [tuple(level.shape) for level in pyramid.levels] == [(2, 6, 64 // s, 64 // s) for s in (4, 8, 16, 32)]
    cell = image[1, 2, 8:12, 4:8].numpy()
    np.testing.assert_allclose(pyramid.levels[0][1, [2, 5], 2, 1], [cell.mean(), cell.std()], rtol=1e-4)
    chip = image[0].numpy()
    np.testing.assert_allclose(
        pyramid.pooled["mean_std"][0], np.concatenate([chip.mean((1, 2)), chip.std((1, 2))]), rtol=1e-4
    )
