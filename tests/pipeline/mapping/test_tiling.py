import numpy as np
import pytest

from pipeline.mapping import tiling


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(100, 32, 8), (104, 32, 8), (20, 32, 8), (32, 32, 16), (33, 32, 0)]
)
def test_tile_axis_tiles_cover_the_scene_and_end_with_it(length, tile, overlap):
    axis = tiling.tile_axis(length, tile, overlap)
    n_tiles = np.zeros(max(length, tile), int)
    for start in axis.starts:
        n_tiles[start : start + tile] += 1
    assert axis.starts[0] == 0
    assert n_tiles[:length].min() >= 1
    assert axis.starts[-1] + tile == max(length, tile)
    assert (np.diff(axis.starts) > 0).all()
    assert axis.weight.min() > 0


def test_blend_window_falls_to_the_edges_and_sums_to_one_at_a_seam():
    window = tiling.blend_window(32, 8)
    assert (np.diff(window[:8]) > 0).all()
    assert (window[8:24] == 1).all()
    assert window[0] < 0.02
    np.testing.assert_allclose(window[-8:] + window[:8], 1, rtol=1e-6)
    np.testing.assert_allclose(tiling.tile_axis(32 + 5 * 24, 32, 8).weight[8:-8], 1, rtol=1e-6)


def test_output_blocks_cover_the_map_once_and_get_every_overlapping_tile():
    y_tiles, x_tiles = tiling.tile_axis(1300, 32, 8), tiling.tile_axis(700, 32, 8)
    n_blocks = np.zeros((1300, 700), int)
    for block in tiling.output_blocks(y_tiles, x_tiles):
        n_blocks[block.toslices()] += 1
        assert block.row_off % tiling.COG_TILE == 0
        end = block.row_off + block.height
        expected = [start for start in y_tiles.starts if start < end and start + 32 > block.row_off]
        assert y_tiles.overlapping(block.row_off, block.height).tolist() == expected
    assert (n_blocks == 1).all()
