"""Assignment of custom chips to splits: blocks, overlap, and images without a location."""

import pytest
from rasterio import Affine

from pipeline.data.image_store import SPLITS, UNLABELLED
from pipeline.errors import UserError
from tests.errors import raises
from tests.pipeline.data.sources.custom import custom_data
from tests.pipeline.data.sources.custom.custom_data import UTM, prepare, tile_dataset, write_tile_pairs


def split_by_image(dataset) -> dict[str, str]:
    """Split of the last chip of each image, by the image's name."""
    return {name.split("_r")[0]: split for name, split in zip(dataset.sample, dataset.split, strict=True)}


@pytest.mark.parametrize("name", ["prepared_scene", "prepared_tiles"])
def test_assign_splits_spatial_blocks_stay_whole(request, name):
    dataset = request.getfixturevalue(name)
    west, north = dataset.transform[:, 2].min(), dataset.transform[:, 5].max()
    splits_of_block = {}
    for (x, y), split in zip(dataset.transform[:, [2, 5]], dataset.split, strict=True):
        splits_of_block.setdefault((int((x - west) // 2560), int((north - y) // 2560)), set()).add(split)
    assert len(splits_of_block) > 6
    assert all(len(splits) == 1 for splits in splits_of_block.values())
    assert {*dataset.split} == {*SPLITS}


@pytest.mark.parametrize("angle", [30, 90])
def test_assign_splits_blocks_of_rotated_images_have_their_size(tmp_path, angle):
    rotated = Affine.translation(400000, 5800000) @ Affine.rotation(angle) @ Affine.scale(10, -10)
    options = write_tile_pairs(tmp_path, [rotated @ Affine.translation(64 * n, 0) for n in range(16)], UTM)
    splits = split_by_image(prepare(tile_dataset(tmp_path, block=128, options=options), tmp_path))
    for index in range(0, 16, 2):
        assert splits[f"t{index:02d}"] == splits[f"t{index + 1:02d}"]


def test_assign_splits_overlapping_images_share_a_split(raw_folder, tmp_path):
    corners = [(row, start + offset) for row in (256, 384) for start in range(0, 1400, 320) for offset in (0, 100)]
    custom_data.write_windows(raw_folder, tmp_path, corners, "images", "masks")
    for seed in range(2):
        dataset = prepare(tile_dataset(tmp_path, chip=128, block=128, seed=seed), tmp_path)
        splits = split_by_image(dataset)
        names = [f"tile_{row:04d}_{column:04d}" for row, column in corners]
        pairs = [pair for pair in zip(names[::2], names[1::2], strict=True) if set(pair) <= set(splits)]
        assert len(pairs) > 6
        assert all(splits[a] == splits[b] for a, b in pairs)
        assert not any("overlap" in note for note in dataset.notes if "polygons" not in note)


def test_assign_splits_connected_images_are_refused_or_noted(raw_folder, tmp_path):
    corners = [(row, column) for row in (256, 384) for column in range(0, 1400, 96)]
    custom_data.write_windows(raw_folder, tmp_path, corners, "images", "masks")
    with raises(UserError, key="split", allowed=("column", "random")) as info:
        prepare(tile_dataset(tmp_path, chip=128, block=128), tmp_path)
    assert info.value.value in (1, 2)
    dataset = prepare(tile_dataset(tmp_path, chip=128, block=0, options={"split": "random"}), tmp_path)
    assert any("overlap with one of another split, such as t" in note for note in dataset.notes)


@pytest.mark.parametrize("seed", range(2))
def test_assign_splits_images_that_overlap_across_the_antimeridian_share_a_split(tmp_path, seed):
    step = 0.0001
    west, east = (179.9966, 179.9866, 179.9766, 179.9666), (-180, -179.99, -179.98, -179.97)
    transforms = [Affine(step, 0, lon, 0, -step, 10) for lon in (*west, *east, 180.05, -179.9468)]
    options = write_tile_pairs(tmp_path, transforms, "EPSG:4326")
    dataset = prepare(tile_dataset(tmp_path, block=64, seed=seed, options=options), tmp_path)
    splits = split_by_image(dataset)
    assert splits["t00"] == splits["t04"]
    assert splits["t08"] == splits["t09"]
    samples = {name: dataset.read_sample(name) for name in dataset.sample}
    assert all(-180 <= sample.lon < 180 for sample in samples.values())
    assert samples["t08_r00000c00000"].lon == pytest.approx(180.0532 - 360)


def test_assign_splits_overlap_of_images_without_crs_is_found(tmp_path):
    options = write_tile_pairs(tmp_path, [Affine(10, 0, 320 * n, 0, -10, 0) for n in range(8)], None)
    with raises(UserError, key="split", value=1):
        prepare(tile_dataset(tmp_path, block=64, options=options), tmp_path)
    dataset = prepare(tile_dataset(tmp_path, block=64, options=options | {"split": "random"}), tmp_path)
    assert any("overlap with one of another split" in note for note in dataset.notes)


@pytest.mark.parametrize(
    "transform", [Affine(1, 0, 0, 0, -1, 64), Affine(10, 0, 500, 0, -10, 900)], ids=["pixel counts", "one transform"]
)
def test_assign_splits_images_without_a_location_do_not_overlap(tmp_path, transform):
    options = write_tile_pairs(tmp_path, [transform] * 8, None)
    assert len(prepare(tile_dataset(tmp_path, block=64, options=options), tmp_path).sample) == 8


def test_assign_splits_unlabelled_in_a_table_is_not_a_split(tiles, tmp_path):
    _, config = custom_data.table_dataset(tiles, tmp_path, {"split": UNLABELLED})
    dataset = prepare(config, tmp_path)
    assert UNLABELLED not in dataset.split
    assert dataset.read_sample("images/tile_0000_0128").label == 1
    with raises(UserError, key="split", value=UNLABELLED, allowed=SPLITS):
        prepare(custom_data.with_options(config, split="column"), tmp_path)
