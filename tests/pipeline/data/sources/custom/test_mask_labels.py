"""Labels as masks."""

from pathlib import Path

import numpy as np
import pytest
from rasterio import Affine
from rasterio.windows import Window

from pipeline.data.sources.custom import labels
from pipeline.data.sources.custom.labels import pair_masks
from pipeline.data.sources.custom.rasters import open_image
from pipeline.errors import UserError
from pipeline.tasks import IGNORE
from tests.errors import raises
from tests.pipeline.data.sources.custom.custom_data import BLUE, GRID, counting_values, rewrite_raster, write_raster

MASK = np.array([[[0, 1, 2, 3], [255, 255, 0, 1]]], "uint8").repeat(32, 1).repeat(16, 2)
ELSEWHERE = Affine(10, 0, 0, 0, -10, 0)


@pytest.fixture
def read_mask(tmp_path):
    """Function that changes a mask of 64 px on disk and reads a window of it."""
    write_raster(tmp_path / "image.tif", counting_values(64, 64), GRID)

    def read(change=lambda path: None, ignore: int | None = 255) -> np.ndarray:
        path = tmp_path / f"mask{len(list(tmp_path.iterdir()))}.tif"
        write_raster(path, MASK, GRID)
        change(path)
        image = open_image([tmp_path / "image.tif"], [BLUE])
        return labels.read_mask({image.paths[0]: str(path)}, 4, ignore, image, Window(0, 0, 64, 64))

    return read


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (lambda path: rewrite_raster(path, lambda mask: mask + 0.5), {"key": "classes", "value": 0.5}),
        (lambda path: rewrite_raster(path, lambda mask: mask + np.nan), {"key": "classes", "allowed": range(4)}),
        (lambda path: rewrite_raster(path, lambda mask: np.repeat(mask, 3, 0)), {"key": "bands", "value": 3}),
        (lambda path: rewrite_raster(path, lambda mask: mask[:, :32], height=32), {"key": "size", "value": (32, 64)}),
        (lambda path: rewrite_raster(path, transform=ELSEWHERE), {"key": "crs"}),
        (lambda path: rewrite_raster(path, crs="EPSG:32632"), {"key": "crs"}),
        (lambda path: rewrite_raster(path, transform=ELSEWHERE, crs=None), {"key": "crs"}),
        (lambda path: path.write_bytes(path.read_bytes()[:600]), {}),
    ],
)
def test_read_mask_invalid_mask_is_refused(read_mask, tmp_path, change, fields):
    with raises(UserError, **fields) as info:
        read_mask(change)
    assert info.value.path.name.startswith("mask")


@pytest.mark.parametrize(("ignore", "dtype"), [(-1, "int16"), (65535, "uint16")])
def test_read_mask_with_an_ignored_value_outside_a_byte_and_without_a_location(read_mask, ignore, dtype):
    def change(path):  # masks often only count pixels from a corner
        mask = np.where(MASK == 255, ignore, MASK.astype("int32")).astype(dtype)
        rewrite_raster(path, lambda _: mask, crs=None, transform=Affine(1, 0, 0, 0, -1, 64))

    assert (MASK == IGNORE).any()
    np.testing.assert_array_equal(read_mask(change, ignore), MASK[0])


def paths(*names: str) -> list[Path]:
    return [Path("/data", name) for name in names]


def test_pair_masks_by_whole_names():
    images = paths(*(f"images/tile_{number}.tif" for number in range(12)))
    masks = paths(*(f"masks/tile_{number}_mask.tif" for number in range(12)))
    assert pair_masks(images, masks, False, []) == dict(zip(map(str, images), map(str, masks), strict=True))
    with raises(UserError, key="labels", value=0, path=images[1]):
        pair_masks(images, masks[:1] + masks[2:], False, [])
    images, (mask,) = paths("tile.tif", "tile_a.tif"), paths("m/tile_a.tif")
    with raises(UserError, images[0], key="labels", value=str(images[1]), path=mask):
        pair_masks(images, [mask], False, [])


def test_pair_masks_by_folders_that_repeat_names():
    images, masks = paths("images/a/t1.tif", "images/b/t1.tif"), paths("masks/a/t1.tif", "masks/b/t1.tif")
    assert pair_masks(images, masks, False, []) == dict(zip(map(str, images), map(str, masks), strict=True))
    with raises(UserError, key="labels", value=2, allowed=[1]):
        pair_masks(images, [*masks, *paths("masks/c/a/t1.tif")], False, [])
    images = paths("images/a/t40.tif", "images/a/t41.tif")  # a mask in a folder of another name is another image's
    with raises(UserError, key="labels", value=0, path=images[1]):
        pair_masks(images, paths("masks/a/t40_mask.tif", "masks/b/t41_mask.tif"), False, [])


def test_pair_masks_image_without_a_mask_is_refused_or_skipped():
    images, masks, notes = paths("i/t1.tif", "i/t2.tif"), paths("m/t1_mask.tif"), []
    with raises(UserError, key="labels", value=0, path=images[1]):
        pair_masks(images, masks, False, notes)
    assert pair_masks(images, masks, True, notes) == {str(images[0]): str(masks[0])}
    assert "t2.tif" in notes[0]
    with raises(UserError, "2 images", key="labels"):
        pair_masks(images, paths("m/x.tif"), True, [])
