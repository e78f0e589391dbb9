"""Unlabelled images: heads and probes ignore them, and distilled students learn from them."""

import dataclasses
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from cache.reader import FeatureStore
from pipeline.composition import probes
from pipeline.composition import search as composition
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
from pipeline.data.image_store import UNLABELLED
from pipeline.distillation import train
from pipeline.distillation.student import make_spec, make_student
from pipeline.distillation.teacher import CachedTeacher
from pipeline.extraction import launch
from pipeline.heads import checkpoint
from pipeline.tasks import NO_CLASS, Classification, get_task
from pipeline.training import protocol, task_data
from pipeline.training.loop import HParams
from pipeline.training.protocol import trained_head
from tests.pipeline.data.sources.custom.custom_data import (
    BLUE_GREEN_RED,
    UNLABELLED_CORNERS,
    prepare,
    scene_dataset,
    tile_dataset,
    with_options,
    with_unlabelled,
    write_table,
    write_windows,
)

EXTRACT = ExtractConfig("float16", "none", "float32", False, 16, 64, False, ("identity",))
HEADS = HeadsConfig(LinearHeadConfig("all", "mean", 40, 20), UPerNetHeadConfig(4, 6, 4))
HPARAMS = {"learning_rate": 0.02, "weight_decay": 0.01}
METADATA = {"dataset": "mine", "model": "lite0", "weights": "random"}


def scene_datasets(raw_folder, tiles, folder):
    """One labelled scene with a file per band, and two unlabelled scenes in other folders."""
    folder.mkdir()
    for path in raw_folder("osm_landuse").iterdir():
        if path.suffix in (".jp2", ".gpkg"):
            shutil.copy(path, folder)
    for name, (row, column) in (("a", (192, 192)), ("b", (448, 704))):
        for band in range(1, 4):
            write_windows(raw_folder, folder, [(row, column)], f"more/{name}", slice(band, band + 1))
            path = folder / f"more/{name}/tile_{row:04d}_{column:04d}.tif"
            path.rename(path.with_name(f"x_B0{band + 1}.tif"))
    options = {"folder": str(folder), "images": "*_B0[2-4].jp2", "bands": BLUE_GREEN_RED}
    dataset = scene_dataset(raw_folder, task="classification", chip=64, options=options)
    return dataset, with_options(dataset, unlabelled="more/*/*.tif")


def table_datasets(raw_folder, tiles, folder):
    table_folder, options = write_table(tiles, folder)
    write_windows(raw_folder, table_folder, UNLABELLED_CORNERS)
    dataset = tile_dataset(tiles, task="classification", chip=0, block=128, options=options)
    return dataset, with_unlabelled(dataset)


def mask_datasets(raw_folder, tiles, folder, **changes):
    shutil.copytree(tiles, folder / "wide")
    write_windows(raw_folder, folder / "wide", UNLABELLED_CORNERS)
    dataset = tile_dataset(folder / "wide", **changes)
    return dataset, with_unlabelled(dataset)


# Kinds of labels: function to the dataset without and with unlabelled images, and the number of unlabelled chips.
KINDS = {
    "masks": (mask_datasets, 24),
    "masks, classification": (partial(mask_datasets, task="classification", options={"purity": 0.5}), 24),
    "masks, multilabel": (partial(mask_datasets, task="multilabel"), 24),
    "table": (table_datasets, 6),
    "scene": (scene_datasets, 8),
}
SLOW = ("masks, classification", "masks, multilabel")


def write_stores(dataset, folder):
    """Write the images store and the features of a small random network with the program's own engine."""
    dataset = with_options(dataset, display=[0, 0.3])
    written = image_writer.write(prepare(dataset, folder), folder / "scratch", folder / "mine.zarr", workers=1)
    (folder / "source.json").write_text('{"weights": "random, seed 0"}')
    # Normalised by the dataset's training split: if unlabelled chips counted, every feature would change.
    backbone = BackboneConfig("efficientnet", "lite0", "random", 32, normalisation="dataset")
    job = launch.ExtractionJob(
        "lite0", backbone, EXTRACT, "cpu", folder / "mine.zarr", folder, folder / "s", folder / "lite0.zarr"
    )
    launch.launch(job, ComputeConfig("cpu", 0, ""))
    return written


def train_and_compose(folder):
    """Run the frozen protocol and a composition search, and write the best head to head.pt."""
    store, images_path = folder / "lite0.zarr", folder / "mine.zarr"
    is_multilabel = get_task(image_store.open_images(images_path).attrs["task"]).is_multilabel
    heads = HEADS if is_multilabel else dataclasses.replace(HEADS, class_weights="balanced")
    data = task_data.load({store: None}, images_path, heads, ("train", "val", "test"), "cpu")
    result = protocol.train_and_test(data, HPARAMS, 2, METADATA)
    checkpoint.save(folder / "head.pt", trained_head(data, "lite0", result.group, result.best_index))
    members, images = task_data.open_aligned({store: None}, images_path)
    config = CompositionConfig((), "logistic", 1, False)
    return result, composition.search({"lite0": members[0]}, images, heads, config)


def n_unlabelled_that_overlap_val_or_test(images):
    """Count from the transforms alone; all transforms have the same axes."""
    width, height = images.sizes["x"], images.sizes["y"]
    pixel_width, _, left, _, pixel_height, top = images.transform.values.T
    right, bottom, split = left + pixel_width * width, top + pixel_height * height, images.split.values
    is_scored = np.isin(split, ("val", "test"))
    overlap_x = np.minimum(right[:, None], right[is_scored]) - np.maximum(left[:, None], left[is_scored])
    overlap_y = np.minimum(top[:, None], top[is_scored]) - np.maximum(bottom[:, None], bottom[is_scored])
    return int(((overlap_x > 1) & (overlap_y > 1)).any(axis=1)[split == UNLABELLED].sum())


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS])
def test_unlabelled_images_change_no_score_and_teach_students(raw_folder, tiles, tmp_path, kind):
    make_datasets, n_unlabelled = KINDS[kind]
    datasets = dict(zip(("plain", "wide"), make_datasets(raw_folder, tiles, tmp_path / "files"), strict=True))
    written = {}
    for name, dataset in datasets.items():
        (tmp_path / name).mkdir()
        written[name] = write_stores(dataset, tmp_path / name)
    assert written["wide"].counts == {**written["plain"].counts, UNLABELLED: n_unlabelled}
    plain, wide = (image_store.open_images(tmp_path / name / "mine.zarr") for name in datasets)
    count = len(plain.sample)
    check_images(plain, wide, datasets["plain"].task)
    check_features(*(FeatureStore(tmp_path / name / "lite0.zarr") for name in datasets), count, n_unlabelled)

    (result, composed), (wide_result, wide_composed) = (train_and_compose(tmp_path / name) for name in datasets)
    pd.testing.assert_frame_equal(result.runs, wide_result.runs, check_exact=True)
    pd.testing.assert_frame_equal(result.predicted, wide_result.predicted, check_exact=True)
    pd.testing.assert_frame_equal(composed.subsets, wide_composed.subsets, check_exact=True)
    states = (group.state_dict().values() for group in (result.group, wide_result.group))
    for actual, expected in zip(*states, strict=True):
        assert torch.equal(actual, expected)

    check_students(tmp_path / "wide", count)
    copied = AugmentedImages.copy_to_file(wide, tmp_path / "pixels.npy")
    assert len(copied.image(slice(None))) == len(copied.label(slice(None))) == len(copied.sample) == count


def check_images(plain, wide, task):
    """The labelled samples come first and are the same; the others have no label."""
    count = len(plain.sample)
    for name in plain.variables:
        if "sample" in plain[name].dims:
            np.testing.assert_array_equal(plain[name], wide[name][:count], err_msg=name)
    assert plain.coords.keys() == wide.coords.keys()
    assert set(wide.split.values[count:].tolist()) == {UNLABELLED}
    missing = get_task(task).missing_label(len(wide.attrs["classes"]), (wide.sizes["y"], wide.sizes["x"]))
    assert (wide.label[count:].values == missing).all()
    assert (wide.image[count:].values != 0).any(axis=(1, 2, 3)).all()
    assert plain.attrs["classes"] == wide.attrs["classes"]
    n_overlapping = n_unlabelled_that_overlap_val_or_test(wide)
    notes = [note for note in wide.attrs["notes"] if "val or test" in note]
    assert [note.split(" of ")[0] for note in notes] == ([str(n_overlapping)] if n_overlapping else [])


def check_features(plain, wide, count, n_unlabelled):
    """The features of labelled samples are the same; those of the others are not empty."""
    assert (wide.rows(UNLABELLED) == np.arange(count, count + n_unlabelled)).all()
    for name in plain.pooled_arrays + plain.level_arrays:
        np.testing.assert_array_equal(plain.read(name, np.arange(count)), wide.read(name, np.arange(count)))
        assert wide.read(name, wide.rows(UNLABELLED)).any()


def check_students(folder, count):
    """With a teacher a student learns from unlabelled chips; the supervised baseline does not use them."""
    steps = StepsConfig(4, 8)
    search = SearchConfig(trials=1, trials_per_round=1, seed=0, learning_rate=(1e-3, 1e-2), weight_decay=(1e-3, 1e-2))
    config = DistillConfig(
        datasets=(), teacher="best", loss_weights=LossWeights(1.0, 1.0, 1.0), temperature=2.0, extra_variants=(),
        classification=steps, segmentation=steps, seeds=1, search=search,
    )  # fmt: skip
    images = AugmentedImages.load(folder / "mine.zarr", 1.0)
    head, rows = checkpoint.load(folder / "head.pt"), images.rows("train", UNLABELLED)
    teacher = CachedTeacher({folder / "lite0.zarr": None}, folder / "mine.zarr", head, rows)
    setup = train.DistillationSetup(images, teacher, config, "cpu")
    assert set(setup.training_rows("distilled")) >= set(range(count, len(images.split)))
    assert set(setup.training_rows("supervised")) == set(np.flatnonzero(images.split == "train"))

    def train_on(rows):
        spec = make_spec(images.images, StudentConfig("test_resnet", "random", chip_size=32, mask_size=32))
        student = make_student(spec, images.mean, images.std, None, 0)
        selected = SetupWithRows(images, teacher, config, "cpu")
        selected.__dict__["rows"] = rows  # the dataclass is frozen
        projectors = train.make_projectors(student, selected, 0)
        return train.train(student, projectors, selected, "distilled", HParams(0.01, 0.01, 0)).state_dict()

    with_unlabelled, without = (train_on(setup.training_rows(variant)) for variant in ("distilled", "supervised"))
    assert any(not torch.equal(tensor, without[name]) for name, tensor in with_unlabelled.items())
    assert all(torch.isfinite(tensor.float()).all() for tensor in train_on(images.rows(UNLABELLED)).values())


class SetupWithRows(train.DistillationSetup):
    """A setup whose training samples are chosen by `rows`."""

    def training_rows(self, variant):
        return self.rows


def test_no_class_is_refused_by_everything_that_counts_classes():
    """A missing label is an invalid index: a sample without a label cannot count as a class by mistake."""
    label, logits = np.array([0] * 99 + [NO_CLASS]), torch.zeros(1, 100, 3)
    task, label_tensor = Classification(3), torch.from_numpy(label)[None]
    weighted = dataclasses.replace(task, class_weights=(1.0, 1.0, 1.0))
    for use in (
        lambda: task.loss(logits, label_tensor),
        lambda: weighted.loss(logits, label_tensor),
        lambda: task.loss_grad(logits, label_tensor),
        lambda: weighted.loss_grad(logits, label_tensor),
        lambda: task.counts(np.zeros(100, int), label),
        lambda: task_data.balanced_weights(label, task),
        lambda: probes.fit_logistic(task, np.random.default_rng(0).normal(size=(100, 2)), label),
        lambda: ["a", "b", "c"][label[-1]],
    ):
        with pytest.raises((IndexError, ValueError, RuntimeError)):
            use()
