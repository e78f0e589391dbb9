"""Images without labels: from files to a store, heads that cannot tell that they are there, and students that can."""

import dataclasses
import functools
import shutil

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from rasterio.windows import Window

from cache.read import Features
from pipeline.composing import compose
from pipeline.datasets import landuse, own
from pipeline.distill import start, train
from pipeline.distill.chips import Chips
from pipeline.distill.describe import shape_of
from pipeline.distill.teacher import Teacher
from pipeline.errors import UserError
from pipeline.extraction import workers
from pipeline.finetune.pictures import Pictures
from pipeline.heads import probes
from pipeline.imagery import images, imagestore
from pipeline.metrics import counts
from pipeline.params import Backbone, Compose, Compute, Extract, Heads, LinearHead, UperNetHead
from pipeline.student_params import Distill, Search, Steps, Student
from pipeline.training import cells, kept, protocol
from pipeline.training.fit import Setting
from pipeline.training.loss import Task, loss, slope
from tests.pipeline.datasets.test_own import THREE, labelled, prepared, scene_block, tile_block, tiles

__all__ = ["tiles"]

NONE = images.UNLABELLED
KEEPS = Extract("float16", "none", "float32", False, 16, 64, False, ("identity",))
HEADS = Heads(LinearHead("all", "mean", 40, 20), UperNetHead(4, 6, 4))
BEST = {"learning_rate": 0.02, "weight_decay": 0.01}
TOLD = {"dataset": "mine", "model": "lite0", "weights": "random"}


read_scene = functools.cache(landuse.read_scene)


def more(raw, folder, places, name="more", bands=slice(1, 4), **profile):
    """Windows of 128 px of the scene, (row, column), as GeoTIFFs of all bands in a folder below this one."""
    scene, transform, crs = read_scene(raw("landuse"))
    (folder / name).mkdir(parents=True, exist_ok=True)
    for row, column in places:
        values = scene[bands][:, row : row + 128, column : column + 128]
        given = {
            "driver": "GTiff", "height": 128, "width": 128, "count": len(values), "dtype": values.dtype, "crs": crs,
            "transform": rasterio.windows.transform(Window(column, row, 128, 128), transform), **profile,
        }  # fmt: skip
        with rasterio.open(folder / name / f"tile_{row:04d}_{column:04d}.tif", "w", **given) as file:
            file.write(values)


# Beside the labelled tiles; the last two lie on labelled ground, across corners of blocks.
PLACES = [(0, 1024), (0, 1152), (0, 1280), (0, 1408), (192, 192), (448, 704)]


@pytest.fixture
def wider(raw, tiles, tmp_path):
    """The labelled tiles and further images."""
    shutil.copytree(tiles, tmp_path / "wide")
    more(raw, tmp_path / "wide", PLACES)
    return tmp_path / "wide"


def both(block):
    """A description without and with the further images."""
    return block, dataclasses.replace(block, options=block.options | {"unlabelled": "more/*.tif"})


def scene_of_bands(raw, tmp_path):
    """One scene, a file a band, in a folder, and two further ones in others."""
    tmp_path.mkdir()
    for path in raw("landuse").iterdir():
        if path.suffix in (".jp2", ".gpkg"):
            shutil.copy(path, tmp_path)
    for name, at in (("a", (192, 192)), ("b", (448, 704))):
        for band in range(1, 4):
            more(raw, tmp_path, [at], f"more/{name}", slice(band, band + 1))
            made = tmp_path / f"more/{name}/tile_{at[0]:04d}_{at[1]:04d}.tif"
            made.rename(made.with_name(f"x_B0{band + 1}.tif"))
    options = {"folder": str(tmp_path), "images": "*_B0[2-4].jp2", "bands": THREE}
    plain = scene_block(raw, task="classification", chip=64, options=options)
    return plain, dataclasses.replace(plain, options=plain.options | {"unlabelled": "more/*/*.tif"})


def table_of(tiles, raw, tmp_path):
    folder, options = labelled(tiles, tmp_path)
    more(raw, folder, PLACES)
    return both(tile_block(tiles, task="classification", chip=0, block=128, options=options))


WAYS = {
    "masks": lambda raw, tiles, folder: both(tile_block(folder_of(raw, tiles, folder))),
    "masks, classified": lambda raw, tiles, folder: both(
        tile_block(folder_of(raw, tiles, folder), task="classification", options={"purity": 0.5})
    ),
    "masks, multi-label": lambda raw, tiles, folder: both(
        tile_block(folder_of(raw, tiles, folder), task="multilabel")
    ),
    "a table": lambda raw, tiles, folder: table_of(tiles, raw, folder),
    "a scene": lambda raw, tiles, folder: scene_of_bands(raw, folder),
}
COUNTS = {"masks": 24, "masks, classified": 24, "masks, multi-label": 24, "a table": 6, "a scene": 8}


def folder_of(raw, tiles, folder):
    shutil.copytree(tiles, folder / "wide")
    more(raw, folder / "wide", PLACES)
    return folder / "wide"


def made(block, folder):
    """The images store and the features of a small untrained network, by the program's own engine."""
    block = dataclasses.replace(block, options=block.options | {"display": [0, 0.3]})
    written = imagestore.write(prepared(block, folder), folder / "scratch", folder / "mine.zarr", workers=1)
    (folder / "source.json").write_text('{"weights": "random, seed 0"}')
    # Normalised by the data set: by its training split, or every feature would be another.
    backbone = Backbone("efficientnet", "lite0", "random", 32, normalisation="dataset")
    workers.run(
        workers.Extraction(
            "lite0", backbone, KEEPS, "cpu", folder / "mine.zarr", folder, folder / "s", folder / "lite0.zarr"
        ),
        Compute("cpu", 0, ""),
    )
    return written


def judged(folder):
    """All that heads and probes find: runs, predictions, the heads' tensors, and the composition search's table."""
    store, pictures = folder / "lite0.zarr", folder / "mine.zarr"
    kind = images.open_images(pictures).attrs["task"]
    heads = HEADS if kind == "multilabel" else dataclasses.replace(HEADS, class_weights="balanced")
    cell = cells.load({store: None}, pictures, heads, ("train", "val", "test"), "cpu")
    tested = protocol.test(cell, BEST, 2, TOLD)
    kept.save(folder / "head.pt", "lite0", cell, tested.group, tested.best)
    members, like = cells.opened({store: None}, pictures)
    found = compose.search({"lite0": members[0]}, like, heads, Compose((), "logistic", 1, False))
    return tested, found


def on_held_ground(store):
    """How many unlabelled chips overlap chips of val or test, by their transforms alone; all have one grid's axes."""
    width, height = store.sizes["x"], store.sizes["y"]
    a, _, left, _, e, top = store.transform.values.T
    right, bottom, split = left + a * width, top + e * height, store.split.values
    held = np.isin(split, ("val", "test"))
    across = np.minimum(right[:, None], right[held]) - np.maximum(left[:, None], left[held])
    down = np.minimum(top[:, None], top[held]) - np.maximum(bottom[:, None], bottom[held])
    return int(((across > 1) & (down > 1)).any(axis=1)[split == NONE].sum())


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=[pytest.mark.slow] * (way in ("masks, classified", "masks, multi-label")))
        for way in WAYS
    ],
)
def test_heads_cannot_tell_and_students_learn(raw, tiles, tmp_path, way):
    plain, wide = WAYS[way](raw, tiles, tmp_path / "files")
    (tmp_path / "plain").mkdir()
    (tmp_path / "wide").mkdir()
    first, second = made(plain, tmp_path / "plain"), made(wide, tmp_path / "wide")
    assert second.counts == {**first.counts, NONE: COUNTS[way]}

    one, two = (images.open_images(tmp_path / name / "mine.zarr") for name in ("plain", "wide"))
    count = len(one.sample)
    for name in one.variables:
        if "sample" in one[name].dims:
            np.testing.assert_array_equal(one[name], two[name][:count], err_msg=name)
    assert one.coords.keys() == two.coords.keys()
    assert set(two.split.values[count:].tolist()) == {NONE}
    wanted = images.no_label(plain.task, len(two.attrs["classes"]), (two.sizes["y"], two.sizes["x"]))
    assert (two.label[count:].values == wanted).all()
    assert (two.image[count:].values != 0).any(axis=(1, 2, 3)).all()
    assert one.attrs["classes"] == two.attrs["classes"]
    said = [note for note in two.attrs["notes"] if "share ground with val or test" in note]
    leaked = on_held_ground(two)
    assert [note.split(" of ")[0] for note in said] == ([str(leaked)] if leaked else [])

    before, after = (Features(tmp_path / name / "lite0.zarr") for name in ("plain", "wide"))
    assert (after.rows(NONE) == np.arange(count, count + COUNTS[way])).all()
    for name in [f"pooled/{name}" for name in before.pooled] + [f"{level}/features" for level in before.levels]:
        np.testing.assert_array_equal(before.read(name, np.arange(count)), after.read(name, np.arange(count)))
        assert after.read(name, after.rows(NONE)).any()

    (before, looked), (after, again) = judged(tmp_path / "plain"), judged(tmp_path / "wide")
    pd.testing.assert_frame_equal(before.runs, after.runs, check_exact=True)
    pd.testing.assert_frame_equal(before.predicted, after.predicted, check_exact=True)
    pd.testing.assert_frame_equal(looked.subsets, again.subsets, check_exact=True)
    for ours, theirs in zip(before.group.state_dict().values(), after.group.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)

    learns(tmp_path / "wide", count)
    pictures = Pictures(two, tmp_path / "pictures.npy")
    assert len(pictures.image) == len(pictures.label) == len(pictures.sample) == count


def learns(folder, count):
    """With a teacher a student learns from chips without labels, and the control does not."""
    steps = Steps(4, 8)
    search = Search(trials=1, parallel=1, seed=0, learning_rate=(1e-3, 1e-2), weight_decay=(1e-3, 1e-2))
    described = Distill((), "best", 1.0, 1.0, 1.0, 2.0, (), chips=steps, masks=steps, seeds=1, search=search)
    chips = Chips(folder / "mine.zarr", 1.0)
    teacher = Teacher(
        {folder / "lite0.zarr": None}, folder / "mine.zarr", kept.load(folder / "head.pt"), chips.taught()
    )
    lesson = train.Lesson(chips, teacher, described, "cpu")
    assert set(lesson.rows("distilled")) >= set(range(count, len(chips.split)))
    assert set(lesson.rows("labels")) == set(np.flatnonzero(chips.split == "train"))

    def student(rows):
        """After some steps on these rows alone."""
        small = Student("test_resnet", "random", chip_size=32, mask_size=32)
        fresh = start.make(shape_of(chips.store, small), chips.mean, chips.std, None, 0)
        alone = _Only(chips, teacher, described, "cpu")
        alone.__dict__["only"] = rows
        ends = train.projectors_of(fresh, alone, 0)
        return train.train(fresh, ends, alone, "distilled", Setting(0.01, 0.01, 0)).state_dict()

    one, two = student(lesson.rows("distilled")), student(lesson.rows("labels"))
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(one.values(), two.values(), strict=True))
    assert all(torch.isfinite(values.float()).all() for values in student(chips.rows(NONE)).values())


class _Only(train.Lesson):
    """A lesson of chosen rows."""

    def rows(self, variant):
        return self.only


def test_names_are_of_files_and_chips_lie_where_they_were_cut(wider, tmp_path):
    stream = prepared(both(tile_block(wider))[1], tmp_path)
    name = "more/tile_0000_1152.tif_r00064c00000"
    place = stream.sample.index(name)
    with rasterio.open(wider / "more/tile_0000_1152.tif") as file:
        np.testing.assert_array_equal(stream.read(name).image, file.read()[:, 64:, :64])
        assert tuple(stream.transform[place]) == tuple(
            file.transform @ rasterio.Affine.translation(0, 64)
        )[:6]  # fmt: skip
    assert stream.split[place] == NONE
    assert (stream.read(name).label == images.IGNORE).all()
    told = [note for note in stream.notes if "share ground with val or test" in note]
    assert len(told) == 1
    assert " of 24 unlabelled chips share ground" in told[0]


def test_the_ground_of_training_chips_is_no_leak(raw, tiles, tmp_path):
    folder, options = labelled(tiles, tmp_path, split=["train"] * 40 + ["val"] * 4 + ["test"] * 4)
    more(raw, folder, [(0, 0), (0, 128), (640, 0), (640, 512), (640, 896)])
    block = tile_block(
        tiles, task="classification", chip=0, block=0, splits=None,
        options=options | {"split": "column", "unlabelled": "more/*.tif"},
    )  # fmt: skip
    notes = [note for note in prepared(block, tmp_path).notes if "unlabelled" in note]
    assert notes == [
        "3 of 5 unlabelled chips share ground with val or test: students see its pixels, though not its labels"
    ]


def test_chips_without_data_are_left_out(raw, wider, tmp_path):
    more(raw, wider, [(0, 1024)], nodata=0)
    path = wider / "more/tile_0000_1024.tif"
    with rasterio.open(path, "r+") as file:
        values = file.read()
        values[:, :10, :10] = 0
        file.write(values)
    stream = prepared(both(tile_block(wider))[1], tmp_path)
    assert "1 of 24 unlabelled chips have pixels without data, and are left out" in stream.notes
    assert stream.split.count(NONE) == 23
    assert "more/tile_0000_1024.tif_r00000c00000" not in stream.sample


def test_the_digest_of_the_files_follows_them(wider, described):
    plain, wide = both(tile_block(wider))
    one, two = (own.fetch(block, described) for block in (plain, wide))
    assert two["files"] == one["files"] + len(PLACES)
    assert one["content_sha256"] != two["content_sha256"]


REFUSED = {
    "of images": (
        {"unlabelled": "images/tile_00*.tif"},
        r"unlabelled \(images/tile_00\*.tif\) and images \(.*8 files",
    ),
    "of labels": ({"unlabelled": "masks/*.tif"}, r"unlabelled .* and labels .*48 files.* a folder of their own"),
    "nothing": ({"unlabelled": "none/*.tif"}, r"has no file like none/\*.tif. It has: images, masks, more"),
    "an absolute path": ({"unlabelled": "/more/*.tif"}, "is an absolute path"),
    "other bands": ({"unlabelled": "single/*.tif"}, "has 1 bands, and 3 are described"),
    "no place": ({"unlabelled": "nowhere/*.tif"}, "states no coordinate reference system, and the labelled images"),
    "damaged": ({"unlabelled": "torn/*.tif"}, "tile_0000_1024.tif cannot be read"),
    "too small": ({"unlabelled": "small/*.tif"}, r"No image of unlabelled \(small/\*.tif\) has 64 x 64 px"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(raw, wider, tmp_path, what):
    more(raw, wider, PLACES[:1], "single", slice(1, 2))
    more(raw, wider, PLACES[:1], "nowhere", crs=None)
    more(raw, wider, PLACES[:1], "torn")
    torn = wider / "torn/tile_0000_1024.tif"
    torn.write_bytes(torn.read_bytes()[:100])
    more(raw, wider, PLACES[:1], "small", height=60, width=60) if what == "too small" else None
    options, words = REFUSED[what]
    if what == "nothing":
        for name in ("single", "nowhere", "torn"):
            shutil.rmtree(wider / name)
    with pytest.raises(UserError, match=words):
        prepared(tile_block(wider, options=options), tmp_path)


def test_tables_whose_further_images_differ_are_refused(raw, tiles, tmp_path):
    folder, options = labelled(tiles, tmp_path / "a", time="2017-02-16")
    more(raw, folder, PLACES)
    block = both(tile_block(tiles, task="classification", chip=0, block=128, options=options))[1]
    with pytest.raises(UserError, match="labelled images all have a time.*State theirs as time"):
        prepared(block, tmp_path)
    block = dataclasses.replace(block, options=block.options | {"time": "2018-01-01"})
    stream = prepared(block, tmp_path)
    assert stream.read("more/tile_0000_1024.tif").time == np.datetime64("2018-01-01", "s")
    assert stream.read("images/tile_0000_0000").time == np.datetime64("2017-02-16", "s")
    path = folder / "more/tile_0000_1024.tif"
    with rasterio.open(path) as file:
        small, profile = file.read(window=Window(0, 0, 100, 100)), {**file.profile, "height": 100, "width": 100}
    with rasterio.open(path, "w", **profile) as file:
        file.write(small)
    with pytest.raises(UserError, match="of unlabelled, has 100 x 100 px, and .* has 128 x 128 px. Give a chip"):
        prepared(block, tmp_path)
    assert prepared(dataclasses.replace(block, chip=64), tmp_path).split.count(NONE) == 6


def test_a_tables_split_of_that_name_makes_no_unlabelled_chip(tiles, tmp_path):
    """Those of a table have labels: another rule deals them, and the rule `column` refuses the name."""
    _, options = labelled(tiles, tmp_path, split=NONE)
    block = tile_block(tiles, task="classification", chip=0, block=128, options=options)
    stream = prepared(block, tmp_path)
    assert NONE not in stream.split
    assert stream.read("images/tile_0000_0128").label == 1
    with pytest.raises(UserError, match="is 'unlabelled'; it must be one of train, val, test"):
        prepared(dataclasses.replace(block, options=block.options | {"split": "column"}), tmp_path)


def test_damaged_ones_are_left_out_if_asked_for(wider, tmp_path):
    (wider / "more/tile_0000_1024.tif").write_bytes(b"")
    block = both(tile_block(wider, options={"skip_bad": True}))[1]
    stream = prepared(block, tmp_path)
    assert stream.split.count(NONE) == 20
    assert any(note.startswith("left out: ") and "tile_0000_1024" in note for note in stream.notes)


def test_a_store_holds_no_label_of_an_unlabelled_chip(wider, tmp_path):
    stream = prepared(both(tile_block(wider))[1], tmp_path)
    name = stream.sample[-1]
    stream.read.chips[name] = dataclasses.replace(stream.read.chips[stream.sample[0]])
    with pytest.raises(UserError, match="Sample more/.*: A sample of the split unlabelled has a label"):
        imagestore.write(stream, tmp_path / "scratch", tmp_path / "store", workers=1)
    assert not (tmp_path / "store").exists()


def test_what_stands_for_a_class_is_none_to_anything_that_counts():
    label, logits = np.array([0] * 99 + [images.NO_CLASS]), torch.zeros(1, 100, 3)
    task, given = Task("classification", 3), torch.from_numpy(label)[None]
    weighted = dataclasses.replace(task, weights=(1.0, 1.0, 1.0))
    for read in (
        lambda: loss(logits, given, task),
        lambda: loss(logits, given, weighted),
        lambda: slope(logits, given, task),
        lambda: slope(logits, given, weighted),
        lambda: counts("classification", np.zeros(100, int), label, 3, None),
        lambda: cells._balanced(label, "classification", 3),
        lambda: probes.logistic("classification", np.random.default_rng(0).normal(size=(100, 2)), label, 3),
        lambda: ["a", "b", "c"][label[-1]],
    ):
        with pytest.raises((IndexError, ValueError, RuntimeError)):
            read()
