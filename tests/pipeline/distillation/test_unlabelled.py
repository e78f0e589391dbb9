"""Images without labels: heads and probes cannot tell that they are there, and students learn from them."""

import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from pipeline.distillation.describe import make_spec

from cache.reader import FeatureStore
from pipeline.composition import search as compose
from pipeline.config import (
    BackboneConfig,
    CompositionConfig,
    ComputeConfig,
    DistillConfig,
    ExtractConfig,
    HeadsConfig,
    LinearHeadConfig,
    LossWeights,
    SearchConfig,
    StepsConfig,
    StudentConfig,
    UPerNetHeadConfig,
)
from pipeline.data import image_store, image_writer
from pipeline.data.augmentation import AugmentedImages
from pipeline.distillation import start, train
from pipeline.distillation.teacher import CachedTeacher
from pipeline.extraction import launch
from pipeline.heads import checkpoint, probes
from pipeline.metrics import counts
from pipeline.tasks import Classification
from pipeline.training import protocol, task_data
from pipeline.training.loop import HParams
from tests.pipeline.data.sources.custom.test_custom import THREE, labelled, prepared, scene_block, tile_block, tiles
from tests.pipeline.data.sources.custom.test_unlabelled import PLACES, both, more

__all__ = ["tiles"]
NONE = image_store.UNLABELLED
KEEPS = ExtractConfig("float16", "none", "float32", False, 16, 64, False, ("identity",))
HEADS = HeadsConfig(LinearHeadConfig("all", "mean", 40, 20), UPerNetHeadConfig(4, 6, 4))
BEST = {"learning_rate": 0.02, "weight_decay": 0.01}
TOLD = {"dataset": "mine", "model": "lite0", "weights": "random"}


def scene_of_bands(raw, tmp_path):
    """One scene, a file a band, in a folder, and two further ones in others."""
    tmp_path.mkdir()
    for path in raw("osm_landuse").iterdir():
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
    written = image_writer.write(prepared(block, folder), folder / "scratch", folder / "mine.zarr", workers=1)
    (folder / "source.json").write_text('{"weights": "random, seed 0"}')
    # Normalised by the data set: by its training split, or every feature would be another.
    backbone = BackboneConfig("efficientnet", "lite0", "random", 32, normalisation="dataset")
    launch.launch(
        launch.ExtractionJob(
            "lite0", backbone, KEEPS, "cpu", folder / "mine.zarr", folder, folder / "s", folder / "lite0.zarr"
        ),
        ComputeConfig("cpu", 0, ""),
    )
    return written


def judged(folder):
    """All that heads and probes find: runs, predictions, the heads' tensors, and the composition search's table."""
    store, pictures = folder / "lite0.zarr", folder / "mine.zarr"
    kind = image_store.open_images(pictures).attrs["task"]
    heads = HEADS if kind == "multilabel" else dataclasses.replace(HEADS, class_weights="balanced")
    cell = task_data.load({store: None}, pictures, heads, ("train", "val", "test"), "cpu")
    tested = protocol.train_and_test(cell, BEST, 2, TOLD)
    checkpoint.save(folder / "head.pt", "lite0", cell, tested.group, tested.best_index)
    members, like = task_data.open_aligned({store: None}, pictures)
    found = compose.search({"lite0": members[0]}, like, heads, CompositionConfig((), "logistic", 1, False))
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
def test_heads_cannot_tell_and_students_learn(raw_folder, tiles, tmp_path, way):
    plain, wide = WAYS[way](raw_folder, tiles, tmp_path / "files")
    (tmp_path / "plain").mkdir()
    (tmp_path / "wide").mkdir()
    first, second = made(plain, tmp_path / "plain"), made(wide, tmp_path / "wide")
    assert second.counts == {**first.counts, NONE: COUNTS[way]}

    one, two = (image_store.open_images(tmp_path / name / "mine.zarr") for name in ("plain", "wide"))
    count = len(one.sample)
    for name in one.variables:
        if "sample" in one[name].dims:
            np.testing.assert_array_equal(one[name], two[name][:count], err_msg=name)
    assert one.coords.keys() == two.coords.keys()
    assert set(two.split.values[count:].tolist()) == {NONE}
    wanted = image_store.missing_label(plain.task, len(two.attrs["classes"]), (two.sizes["y"], two.sizes["x"]))
    assert (two.label[count:].values == wanted).all()
    assert (two.image[count:].values != 0).any(axis=(1, 2, 3)).all()
    assert one.attrs["classes"] == two.attrs["classes"]
    said = [note for note in two.attrs["notes"] if "share ground with val or test" in note]
    leaked = on_held_ground(two)
    assert [note.split(" of ")[0] for note in said] == ([str(leaked)] if leaked else [])

    before, after = (FeatureStore(tmp_path / name / "lite0.zarr") for name in ("plain", "wide"))
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
    pictures = AugmentedImages.copy_to_file(two, tmp_path / "pictures.npy")
    assert len(pictures.images.image) == len(pictures.sample) == count


def learns(folder, count):
    """With a teacher a student learns from chips without labels, and the control does not."""
    steps = StepsConfig(4, 8)
    search = SearchConfig(trials=1, trials_per_round=1, seed=0, learning_rate=(1e-3, 1e-2), weight_decay=(1e-3, 1e-2))
    described = DistillConfig(
        (),
        "best",
        LossWeights(1.0, 1.0, 1.0),
        2.0,
        (),
        classification=steps,
        segmentation=steps,
        seeds=1,
        search=search,
    )
    chips = AugmentedImages.load(folder / "mine.zarr", 1.0)
    teacher = CachedTeacher(
        {folder / "lite0.zarr": None},
        folder / "mine.zarr",
        checkpoint.load(folder / "head.pt"),
        chips.rows("train", "unlabelled"),
    )
    lesson = train.DistillationSetup(chips, teacher, described, "cpu")
    assert set(lesson.rows("distilled")) >= set(range(count, len(chips.split)))
    assert set(lesson.rows("supervised")) == set(np.flatnonzero(chips.split == "train"))

    def student(rows):
        """After some steps on these rows alone."""
        small = StudentConfig("test_resnet", "random", chip_size=32, mask_size=32)
        fresh = start.make_student(make_spec(chips.images, small), chips.mean, chips.std, None, 0)
        alone = _Only(chips, teacher, described, "cpu")
        alone.__dict__["only"] = rows
        ends = train.make_projectors(fresh, alone, 0)
        return train.train(fresh, ends, alone, "distilled", HParams(0.01, 0.01, 0)).state_dict()

    one, two = student(lesson.rows("distilled")), student(lesson.rows("supervised"))
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(one.values(), two.values(), strict=True))
    assert all(torch.isfinite(values.float()).all() for values in student(chips.rows(NONE)).values())


class _Only(train.DistillationSetup):
    """A lesson of chosen rows."""

    def rows(self, variant):
        return self.only


def test_what_stands_for_a_class_is_none_to_anything_that_counts():
    label, logits = np.array([0] * 99 + [image_store.NO_CLASS]), torch.zeros(1, 100, 3)
    task, given = Classification(3), torch.from_numpy(label)[None]
    weighted = dataclasses.replace(task, weights=(1.0, 1.0, 1.0))
    for read in (
        lambda: task.loss(logits, given),
        lambda: weighted.loss(logits, given),
        lambda: task.loss_grad(logits, given),
        lambda: weighted.loss_grad(logits, given),
        lambda: counts("classification", np.zeros(100, int), label, 3, None),
        lambda: task_data._balanced(label, "classification", 3),
        lambda: probes.fit_logistic("classification", np.random.default_rng(0).normal(size=(100, 2)), label, 3),
        lambda: ["a", "b", "c"][label[-1]],
    ):
        with pytest.raises((IndexError, ValueError, RuntimeError)):
            read()
