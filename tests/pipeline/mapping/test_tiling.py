import numpy as np
import pytest

from pipeline.mapping import tiling


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(100, 32, 8), (104, 32, 8), (20, 32, 8), (32, 32, 16), (33, 32, 0)]
)
def test_tiles_cover_a_scene_and_end_with_it(length, tile, overlap):
    made = tiling.tile_axis(length, tile, overlap)
    covered = np.zeros(max(length, tile), int)
    for start in made.starts:
        covered[start : start + tile] += 1
    assert made.starts[0] == 0
    assert covered[:length].min() >= 1
    assert made.starts[-1] + tile == max(length, tile)
    assert (np.diff(made.starts) > 0).all()
    assert made.weight.min() > 0


def test_weights_fall_towards_edges_and_sum_to_one_at_a_seam():
    weight = tiling.blend_window(32, 8)
    assert (np.diff(weight[:8]) > 0).all()
    assert (weight[8:24] == 1).all()
    assert weight[0] < 0.02
    np.testing.assert_allclose(weight[-8:] + weight[:8], 1, rtol=1e-6)
    np.testing.assert_allclose(tiling.tile_axis(32 + 5 * 24, 32, 8).weight[8:-8], 1, rtol=1e-6)


def test_blocks_cover_a_map_once_and_see_every_tile_that_reaches_them():
    rows, columns = tiling.tile_axis(1300, 32, 8), tiling.tile_axis(700, 32, 8)
    covered = np.zeros((1300, 700), int)
    for block in tiling.output_blocks(rows, columns):
        covered[block.row : block.row + block.height, block.column : block.column + block.width] += 1
        assert block.row % tiling.COG_TILE == 0
        reaching = rows.overlapping(block.row, block.row + block.height)
        touching = [s for s in rows.starts if s < block.row + block.height and s + 32 > block.row]
        assert reaching.tolist() == touching
    assert (covered == 1).all()
