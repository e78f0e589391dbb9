"""Labels as masks."""

import shutil

import numpy as np
import pytest
import rasterio
from rasterio import Affine

from pipeline.data.sources.custom.labels import pair_masks
from pipeline.errors import UserError
from tests.errors import raises
from tests.pipeline.data.sources.custom.custom_data import copy_tiles, prepare, rewrite_raster, tile_dataset

ELSEWHERE = Affine(10, 0, 400000, 0, -10, 5800000)


def halves(mask):
    return np.where(mask == 255, 255, 0.5).astype("float32")


def nan_for_ignored(mask):
    return np.where(mask == 255, np.nan, mask).astype("float32")


INVALID_MASKS = {
    "fractions": (lambda path: rewrite_raster(path, halves), {"key": "classes", "value": 0.5, "allowed": range(7)}),
    "NaN": (lambda path: rewrite_raster(path, nan_for_ignored), {"key": "classes", "allowed": range(7)}),
    "three bands": (
        lambda path: rewrite_raster(path, lambda mask: np.repeat(mask, 3, 0)),
        {"key": "bands", "value": 3, "allowed": [1]},
    ),
    "another size": (
        lambda path: rewrite_raster(path, lambda mask: mask[:, :64], height=64),
        {"key": "size", "value": (64, 128), "allowed": [(128, 128)]},
    ),
    "another location": (lambda path: rewrite_raster(path, transform=ELSEWHERE), {"key": "crs"}),
    "another CRS": (lambda path: rewrite_raster(path, crs="EPSG:32632"), {"key": "crs"}),
    "another location, no CRS": (lambda path: rewrite_raster(path, transform=ELSEWHERE, crs=None), {"key": "crs"}),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:600]), {}),
}


@pytest.mark.parametrize("kind", INVALID_MASKS)
def test_mask_labels_invalid_mask_is_refused(tiles, tmp_path, kind):
    change, fields = INVALID_MASKS[kind]
    folder = copy_tiles(tiles, tmp_path)
    for path in (folder / "masks").iterdir():
        change(path)
    with raises(UserError, **fields) as info:
        prepare(tile_dataset(folder), tmp_path)
    assert info.value.path.parent == folder / "masks"


@pytest.mark.parametrize(("ignore", "dtype"), [(-1, "int16"), (65535, "uint16")])
def test_mask_labels_ignored_value_outside_a_byte_is_ignored(tiles, tmp_path, ignore, dtype):
    folder = copy_tiles(tiles, tmp_path)
    for path in (folder / "masks").iterdir():
        rewrite_raster(path, lambda mask: np.where(mask == 255, ignore, mask.astype("int32")).astype(dtype))
    expected = prepare(tile_dataset(tiles), tmp_path)
    actual = prepare(tile_dataset(folder, options={"ignore": ignore}), tmp_path)
    name = expected.sample[0]
    np.testing.assert_array_equal(actual.read_sample(name).label, expected.read_sample(name).label)


def test_pair_masks_by_whole_names(tmp_path):
    images = [tmp_path / f"images/tile_{number}.tif" for number in range(12)]
    masks = [tmp_path / f"masks/tile_{number}_mask.tif" for number in range(12)]
    mask_of_image = pair_masks(images, masks, False, [])
    assert [mask_of_image[str(image)] for image in images] == list(map(str, masks))
    with raises(UserError, key="labels", value=0, path=images[1]):
        pair_masks(images, masks[:1] + masks[2:], False, [])
    images, mask = [tmp_path / "tile.tif", tmp_path / "tile_a.tif"], tmp_path / "m/tile_a.tif"
    with raises(UserError, images[0], key="labels", value=str(images[1]), path=mask):
        pair_masks(images, [mask], False, [])


def test_pair_masks_by_folders_that_repeat_names(tiles, tmp_path):
    folder = tmp_path / "tiles"
    paths = {kind: sorted((tiles / kind).iterdir()) for kind in ("images", "masks")}
    for kind, files in paths.items():
        for index, path in enumerate(files):
            target = folder / kind / "ab"[index % 2] / f"t{index // 2:02d}.tif"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    options = {"images": "images/**/*.tif", "labels": "masks/**/*.tif"}
    dataset = prepare(tile_dataset(folder, options=options), tmp_path)
    assert len(dataset.sample) == len(prepare(tile_dataset(tiles), tmp_path).sample) > 100
    name = next(name for name in dataset.sample if name.startswith("images/b/t03") and name.endswith("r00000c00000"))
    with rasterio.open(paths["masks"][7]) as file:
        np.testing.assert_array_equal(dataset.read_sample(name).label, file.read(1)[:64, :64])
    shutil.copytree(folder / "masks/a", folder / "masks/c/a")
    with raises(UserError, key="labels", value=2, allowed=[1]):
        prepare(tile_dataset(folder, options=options), tmp_path)


def test_pair_masks_in_a_folder_of_another_name_belong_to_other_images(tiles, tmp_path):
    for kind, ending in (("images", ""), ("masks", "_mask")):
        for number, path in enumerate(sorted((tiles / kind).iterdir())):
            folder = tmp_path / kind / ("b" if kind == "masks" and number > 40 else "a")
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / f"t{number:02d}{ending}.tif")
    options = {"images": "images/**/*.tif", "labels": "masks/**/*.tif"}
    with raises(UserError, key="labels", value=0, path=tmp_path / "images/a/t41.tif"):
        prepare(tile_dataset(tmp_path, options=options), tmp_path)


def test_pair_masks_image_without_a_mask_is_refused_or_skipped(tiles, tmp_path):
    folder, image = copy_tiles(tiles, tmp_path), "tile_0000_0128"
    (folder / f"masks/{image}_mask.tif").unlink()
    with raises(UserError, key="labels", value=0, path=folder / f"images/{image}.tif"):
        prepare(tile_dataset(folder), tmp_path)
    dataset = tile_dataset(folder, options={"skip_bad": True})
    prepared = prepare(dataset, tmp_path)
    assert not any(name.startswith(image) for name in prepared.sample)
    assert any(f"{image}.tif" in note for note in prepared.notes)
    for path in (folder / "masks").iterdir():
        path.rename(path.with_name(f"x{path.name.replace('tile', '')}"))
    with raises(UserError, "48 images", key="labels"):
        prepare(dataset, tmp_path)
