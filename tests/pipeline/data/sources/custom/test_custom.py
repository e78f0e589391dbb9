"""Data of one's own, made from the sample scene: three ways in, and the way back on a map."""

import dataclasses
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import rasterio
import yaml
from rasterio.windows import Window

from pipeline.config import DatasetConfig, SplitFractions, parse
from pipeline.data import image_store, image_writer
from pipeline.data.sources import custom, osm_landuse, validate
from tests.conftest import ROOT

BANDS = [
    {"name": one.name, "common_name": one.common_name, "wavelength": one.wavelength, "gsd": one.gsd}
    for one in osm_landuse.BANDS
]
THREE = [BANDS[place] for place in (1, 2, 3)]
SPLITS = SplitFractions(0.6, 0.2, 0.2)


def scene_block(raw, **changes) -> DatasetConfig:
    options = {
        "folder": str(raw("osm_landuse")), "images": "*_B??.jp2", "labels": "*.gpkg", "label_column": "fclass",
        "units": "dn", "bands": BANDS, "display": [0, 0.3], "time": "2017-02-16T10:21:01",
    }  # fmt: skip
    options |= changes.pop("options", {})
    return DatasetConfig(
        "custom", **{"task": "segmentation", "chip": 128, "block": 256, "splits": SPLITS} | changes, options=options
    )


@pytest.fixture(scope="session")
def tiles(raw_folder, tmp_path_factory):
    """The scene's blue, green and red as 48 GeoTIFFs of 128 px with masks, in folders `images` and `masks`."""
    folder = tmp_path_factory.mktemp("tiles")
    scene, transform, crs = osm_landuse.read_scene(raw_folder("osm_landuse"))
    mask = osm_landuse.read_mask(raw_folder("osm_landuse"), transform, scene.shape[1:])
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for row in range(0, 768, 128):
        for column in range(0, 1024, 128):
            window = Window(column, row, 128, 128)
            profile = {
                "driver": "GTiff", "height": 128, "width": 128, "crs": crs,
                "transform": rasterio.windows.transform(window, transform),
            }  # fmt: skip
            area = (slice(row, row + 128), slice(column, column + 128))
            name = f"tile_{row:04d}_{column:04d}"
            with rasterio.open(folder / f"images/{name}.tif", "w", count=3, dtype="uint16", **profile) as file:
                file.write(scene[1:4][:, *area])
            with rasterio.open(folder / f"masks/{name}_mask.tif", "w", count=1, dtype="uint8", **profile) as file:
                file.write(mask[area], 1)
    return folder


def tile_block(folder, **changes) -> DatasetConfig:
    options = {
        "folder": str(folder), "images": "images/*.tif", "labels": "masks/*.tif", "units": "dn", "bands": THREE,
        "classes": list(osm_landuse.CLASSES), "ignore": 255,
    }  # fmt: skip
    options |= changes.pop("options", {})
    return DatasetConfig(
        "custom", **{"task": "segmentation", "chip": 64, "block": 256, "splits": SPLITS} | changes, options=options
    )


def prepared(block: DatasetConfig, tmp_path):
    validate("mine", block)
    return custom.prepare(tmp_path, block)


def test_a_scene_with_polygons_is_what_the_sample_source_makes_of_it(raw_folder, sample, tmp_path):
    stream = prepared(scene_block(raw_folder), tmp_path)
    theirs = sample("sample-landuse-seg")
    assert len(stream.sample) == len(theirs.sample) == 72
    classes = {name: index for index, name in enumerate(theirs.classes)} | {"grass": theirs.classes.index("meadow")}
    renumber = np.full(256, image_store.IGNORE)
    renumber[: len(stream.classes)] = [classes[name] for name in stream.classes]
    for number in (0, 30, 71):
        one = stream.read_sample(stream.sample[number])
        np.testing.assert_array_equal(one.image, theirs.image[number])
        np.testing.assert_array_equal(renumber[one.label], theirs.label[number])
        assert (one.lat, one.lon) == pytest.approx((theirs.lat[number], theirs.lon[number]))
        assert one.time == theirs.time[number]


@pytest.fixture
def sample(request):
    return request.getfixturevalue("image_dataset")


def test_blocks_of_ground_are_dealt_whole(raw_folder, tiles, tmp_path):
    for block in (scene_block(raw_folder), tile_block(tiles)):
        stream = prepared(block, tmp_path)
        homes = {}
        for (x, y), split in zip(stream.transform[:, [2, 5]], stream.split, strict=True):
            west, north = stream.transform[:, 2].min(), stream.transform[:, 5].max()
            homes.setdefault((int((x - west) // 2560), int((north - y) // 2560)), set()).add(split)
        assert len(homes) > 6
        assert all(len(splits) == 1 for splits in homes.values())
        assert {*stream.split} == {"train", "val", "test"}


def test_images_with_masks(tiles, tmp_path):
    stream = prepared(tile_block(tiles), tmp_path)
    assert stream.shape == (3, 64, 64)
    name = next(name for name in stream.sample if name.startswith("tile_0128_0256") and name.endswith("c00064"))
    one = stream.read_sample(name)
    with rasterio.open(tiles / "images/tile_0128_0256.tif") as file:
        np.testing.assert_array_equal(one.image, file.read()[:, int(name[-11:-6]) :, 64:][:, :64])
    with rasterio.open(tiles / "masks/tile_0128_0256_mask.tif") as file:
        np.testing.assert_array_equal(one.label, file.read(1)[int(name[-11:-6]) :, 64:][:64])
    classified = prepared(tile_block(tiles, task="classification", chip=32), tmp_path)
    assert all((classified.read_sample(name).label < 7).all() for name in classified.sample[:9])
    assert "no class covers 60%" in classified.notes[0]
    several = prepared(tile_block(tiles, task="multilabel"), tmp_path)
    assert several.read_sample(name).label.tolist() == [int((one.label == index).any()) for index in range(7)]


def labelled(tiles, tmp_path, **columns):
    folder = tmp_path / "mine"
    shutil.copytree(tiles / "images", folder / "images")
    names = sorted(path.name for path in (folder / "images").iterdir())
    frame = pd.DataFrame({"file": names, "label": [("farm", "forest")[number % 2] for number in range(len(names))]})
    frame.assign(**columns).to_csv(folder / "labels.csv", index=False)
    return folder, {"folder": str(folder), "labels": "labels.csv", "classes": [], "ignore": None}


def test_images_with_a_table(tiles, tmp_path):
    folder, options = labelled(tiles, tmp_path)
    stream = prepared(tile_block(tiles, task="classification", chip=0, block=128, options=options), tmp_path)
    assert stream.classes == ("farm", "forest")
    assert len(stream.sample) == 48
    one = stream.read_sample("images/tile_0000_0128")
    assert one.label == 1
    with rasterio.open(folder / "images/tile_0000_0128.tif") as file:
        np.testing.assert_array_equal(one.image, file.read())
    small = prepared(tile_block(tiles, task="classification", chip=64, block=128, options=options), tmp_path)
    assert small.read_sample("images/tile_0000_0128").image.shape == (3, 64, 64)
    # Both lie where the file does, in pixels of 10 m and of 20 m.
    place = small.sample.index("images/tile_0000_0128")
    same = prepared(tile_block(tiles, task="classification", chip=128, block=128, options=options), tmp_path)
    for made, side in ((stream, 10), (same, 10), (small, 20)):
        with rasterio.open(folder / "images/tile_0000_0128.tif") as file:
            assert made.crs[place] == file.crs.to_wkt()
            corner = file.transform.c, file.transform.f
        a, b, c, d, e, f = made.transform[place]
        assert (a, b, c, d, e, f) == pytest.approx((side, 0, corner[0], 0, -side, corner[1]))
    assert small.notes[0] == "images resampled to 64 px, bilinear"
    assert not any("resampled" in note for note in same.notes)
    written = image_writer.write(stream, tmp_path / "scratch", tmp_path / "store", workers=1)
    assert sum(written.counts.values()) == 48


def test_splits_and_several_labels_in_a_table(tiles, tmp_path):
    splits = (["train"] * 4 + ["val", "test"]) * 8
    _, options = labelled(tiles, tmp_path, split=splits, label=["farm|forest", "farm", ""] * 16)
    block = tile_block(tiles, task="multilabel", chip=0, block=0, splits=None, options=options | {"split": "column"})
    stream = prepared(block, tmp_path)
    assert stream.split == splits
    assert [stream.read_sample(name).label.tolist() for name in stream.sample[:3]] == [[1, 1], [1, 0], [0, 0]]


def test_prepare_scene_chips_keep_crs_and_transform(raw_folder, tmp_path):
    image_writer.write(prepared(scene_block(raw_folder), tmp_path), tmp_path / "scratch", tmp_path / "store", workers=1)
    store = image_store.open_images(tmp_path / "store")
    with rasterio.open(next(raw_folder("osm_landuse").glob("*_B02.jp2"))) as scene:
        for index in (0, 40, 71):
            x, y = (int(store.sample[index].item()[digits]) for digits in (slice(7, 12), slice(1, 6)))
            corner = scene.transform @ rasterio.Affine.translation(x, y)
            assert rasterio.CRS.from_wkt(store.crs[index].item()) == scene.crs
            assert store.transform[index].values.tolist() == pytest.approx(list(corner)[:6])


def test_the_readmes_blocks_are_valid_and_the_first_runs(raw_folder, tmp_path, monkeypatch):
    section = (ROOT / "README.md").read_text().split("## Your own data")[1].split("\n## ")[0]
    blocks = yaml.safe_load(re.search(r"```yaml\n(.*?)```", section, re.DOTALL)[1])["datasets"]
    assert list(blocks) == ["my-scene", "my-tiles", "my-chips"]
    made = {name: parse(DatasetConfig, block, name) for name, block in blocks.items()}
    for name, block in made.items():
        validate(name, block)
    scene = made["my-scene"]
    scene = dataclasses.replace(scene, options={**scene.options, "folder": str(raw_folder("osm_landuse"))})
    stream = prepared(scene, tmp_path)
    assert stream.classes == ("farm", "forest", "meadow", "water")
    assert stream.shape == (3, 128, 128)
    assert {*stream.split} == {"train", "val", "test"}
    (tmp_path / "data/images").mkdir(parents=True)
    image_writer.write(stream, tmp_path / "scratch", tmp_path / "data/images/my-scene.zarr", workers=1)
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], {})
    with rasterio.open("map.tif") as file:
        assert file.res == (10, 10)
