"""Damaged files, lists and options are refused with an error that names them, or skipped."""

import json
import os
import pickle

import h5py
import numpy as np
import pytest

from pipeline.config import DatasetConfig, SplitFractions
from pipeline.data import image_store, image_writer
from pipeline.data.sources import geobench, validate
from pipeline.data.sources.geobench import partitions
from pipeline.errors import UserError
from tests.errors import raises


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(key=None, values=None, attribute=None):
    """Damage a sample: delete a key or replace its values, and replace the attribute 'pickle'."""

    def damage(path):
        with h5py.File(path, "r+") as file:
            if key:
                del file[key]
            if values is not None:
                file[key] = values
            if attribute is not None:
                file.attrs["pickle"] = attribute

    return damage


class Attack:
    """Unpickles by creating a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def attack(path):
    change(attribute=str(pickle.dumps({"label": Attack(path.parent.parent / "ran")})))(path)


def change_label(label):
    return change(attribute=str(pickle.dumps({"label": label})))


BLUE = "02 - Blue"
# Damage of a sample, and the fields of the error; none where HDF5 itself refuses the file.
DAMAGE = {
    "truncated": (truncate, {}),
    "empty": (lambda path: path.write_bytes(b""), {}),
    "missing": (lambda path: path.unlink(), {}),
    "band missing": (change("11 - SWIR"), {"key": "11 - SWIR"}),
    "wrong shape": (change(BLUE, np.zeros((32, 31), np.float32)), {"key": BLUE, "value": (32, 31)}),
    "wrong shape, same size": (change(BLUE, np.zeros((16, 64), np.float32)), {"key": BLUE, "value": (16, 64)}),
    "structured band": (change(BLUE, np.zeros((32, 32), [("a", "f4"), ("b", "f4")])), {"key": BLUE}),
    "label out of range": (change_label(17), {"key": "label", "value": 17, "allowed": range(17)}),
    "no label": (change(attribute=str(pickle.dumps({}))), {"key": "label", "value": None}),
    "attack": (attack, {"key": "pickle", "value": "posix.system"}),
    "attribute is code": (change(attribute="open('x')"), {"key": "pickle"}),
    "attribute is an array": (change(attribute=np.zeros(3)), {"key": "pickle"}),
    "attribute is truncated": (change(attribute=np.bytes_(b"b'x")), {"key": "pickle"}),
    "pickle is truncated": (change(attribute=str(pickle.dumps({"label": 1})[:-4])), {"key": "pickle"}),
}
NON_FINITE_BAND = change(BLUE, np.full((32, 32), np.nan, np.float32))


def check_sample_is_skipped(images, folder, tmp_path):
    """Write all samples but the damaged id_0007."""
    assert not (tmp_path / "store").exists()
    summary = image_writer.write(images, tmp_path / "scratch", tmp_path / "store", skip_bad=True)
    assert list(summary.skipped) == ["id_0007"]
    assert summary.counts == {"train": 6, "val": 3, "test": 4}
    store = image_store.open_images(tmp_path / "store")
    assert "id_0007" in store.attrs["skipped"]
    assert "id_0007" not in store.sample.values
    np.testing.assert_array_equal(store.image[7], images.read_sample("id_0008").image)
    assert not (folder.parent / "ran").exists()


@pytest.mark.parametrize("kind", DAMAGE)
def test_write_damaged_file_is_named_or_skipped(copy_set, open_set, tmp_path, kind):
    damage, fields = DAMAGE[kind]
    root, folder = copy_set("m-so2sat")
    path = folder / "id_0007.hdf5"
    damage(path)
    images = open_set(root, "m-so2sat")
    with raises(UserError, path, path=path, **fields):
        image_writer.write(images, tmp_path / "scratch", tmp_path / "store")
    check_sample_is_skipped(images, folder, tmp_path)


def test_write_non_finite_image_is_named_or_skipped(copy_set, open_set, tmp_path):
    root, folder = copy_set("m-so2sat")
    NON_FINITE_BAND(folder / "id_0007.hdf5")
    images = open_set(root, "m-so2sat")
    with raises(UserError, "id_0007"):
        image_writer.write(images, tmp_path / "scratch", tmp_path / "store")
    check_sample_is_skipped(images, folder, tmp_path)


def test_prepare_first_files_damaged_are_named_or_skipped(copy_set, open_set, tmp_path):
    root, folder = copy_set("m-so2sat")
    for number in (0, 1):
        truncate(folder / f"id_000{number}.hdf5")
    with raises(UserError, path=folder / "id_0000.hdf5"):
        open_set(root, "m-so2sat")
    images = open_set(root, "m-so2sat", skip_bad=True)
    summary = image_writer.write(images, tmp_path / "scratch", tmp_path / "store", skip_bad=True)
    assert list(summary.skipped) == ["id_0000", "id_0001"]
    for path in folder.glob("*.hdf5"):
        truncate(path)
    with raises(UserError) as info:
        open_set(root, "m-so2sat", skip_bad=True)
    assert info.value.path.parent == folder


def test_reader_label_that_contradicts_the_json_file_is_refused(copy_set, open_set):
    root, folder = copy_set("m-pv4ger")
    path = folder / "label_map.json"
    samples_of_class = json.loads(path.read_text())
    moved = samples_of_class["0"].pop()
    samples_of_class["1"].append(moved)
    path.write_text(json.dumps(samples_of_class))
    with raises(UserError, key="label", value=0, allowed=[1], path=folder / f"{moved}.hdf5"):
        open_set(root, "m-pv4ger").read_sample(moved)
    samples_of_class["0"].append(moved)
    path.write_text(json.dumps(samples_of_class))
    with raises(UserError, moved, value=moved, path=path):
        open_set(root, "m-pv4ger")


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("u1", 2), ("u1", 255), ("<i8", -1), ("<i8", -(2**63)), ("<i8", 2), (">i4", -1), (">i4", 1 << 24),
        ("f4", -1.0), ("f4", 0.5), ("f4", 2.0), ("f8", -1.0), ("f8", 256.0),
    ],
)  # fmt: skip
def test_reader_mask_with_an_invalid_value_is_refused(copy_set, open_set, dtype, value):
    root, folder = copy_set("m-pv4ger-seg")
    images = open_set(root, "m-pv4ger-seg")
    name = images.sample[0]
    path = folder / f"{name}.hdf5"
    mask = np.zeros((320, 320), dtype)
    change("label", mask)(path)
    np.testing.assert_array_equal(images.read_sample(name).label, 0)
    mask[100, 200] = value
    change("label", mask)(path)
    with raises(UserError, value, "m-pv4ger-seg", key="label", value=[value], allowed=[0, 1], path=path):
        images.read_sample(name)


def test_reader_boolean_mask_is_read(copy_set, open_set):
    root, folder = copy_set("m-pv4ger-seg")
    images = open_set(root, "m-pv4ger-seg")
    mask = np.zeros((320, 320), bool)
    mask[:40, :40] = True
    change("label", mask)(folder / f"{images.sample[0]}.hdf5")
    np.testing.assert_array_equal(images.read_sample(images.sample[0]).label, mask)


@pytest.mark.parametrize("split", ["train", "test"])
def test_read_partition_repeated_sample_is_refused_or_dropped(copy_set, open_set, split):
    root, folder = copy_set("m-so2sat")
    path = folder / "default_partition.json"
    partition = json.loads(path.read_text())
    partition[split].append("id_0000")
    path.write_text(json.dumps(partition))
    with raises(UserError, "train", split, key=split, value="id_0000", path=path):
        open_set(root, "m-so2sat")
    images = open_set(root, "m-so2sat", skip_bad=True)
    assert images.sample.count("id_0000") == 1
    assert images.split[images.sample.index("id_0000")] == "train"
    assert any(f"id_0000 in {split}" in note for note in images.notes)


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"train": ["../../m-eurosat/id_0000"]}, {"key": "train", "value": "../../m-eurosat/id_0000"}),
        ({"train": ["id_0000", 1]}, {"key": "train", "value": 1}),
        ({"train": {"id_0000": 1}}, {"key": "train", "value": {"id_0000": 1}}),
        ({"more": []}, {"value": ["train", "valid", "test", "more"], "allowed": ("train", "valid", "test")}),
        (["id_0000"], {"value": [], "allowed": ("train", "valid", "test")}),
        (7, {"value": [], "allowed": ("train", "valid", "test")}),
    ],
    ids=["path as name", "number as name", "no list", "unknown split", "list", "number"],
)
def test_read_partition_with_another_structure_is_refused(copy_set, open_set, changes, fields):
    root, folder = copy_set("m-so2sat")
    path = folder / "default_partition.json"
    partition = json.loads(path.read_text())
    path.write_text(json.dumps(partition | changes if isinstance(changes, dict) else changes))
    with raises(UserError, path=path, **fields):
        open_set(root, "m-so2sat")


def test_read_published_stats_incomplete_entries_are_ignored_and_others_refused(copy_set, open_set):
    root, folder = copy_set("m-cashew-plantation")
    path = folder / "band_stats.json"
    stats = json.loads(path.read_text())
    path.write_text(json.dumps(stats | {"label": {"mean": None}, "01": {"std": 1.0}}))
    open_set(root, "m-cashew-plantation")
    for text in ("{", "[1]", '{"01": 3}'):
        path.write_text(text)
        with raises(UserError, path, path=path):
            partitions.read_published_stats(folder, geobench.SETS["m-cashew-plantation"], ("01",), 1)


@pytest.mark.parametrize(
    ("options", "mentions", "fields"),
    [
        ({"set": "m-eurosta"}, ["m-bigearthnet"], {"key": "datasets.m.options.set", "value": "m-eurosta"}),
        (
            {"set": "m-so2sat", "bands": ["thermal"]},
            ["m-so2sat", "sar_vh_real"],
            {"key": "datasets.m.options.bands", "value": ["thermal"]},
        ),
        ({"set": "m-so2sat", "as_labeled": True}, ["as_labeled"], {"key": "datasets.m.options.as_labeled"}),
        ({}, ["set"], {"key": "datasets.m.options.set"}),
    ],
    ids=["unknown set", "unknown band", "unknown option", "no set"],
)
def test_validate_invalid_options_are_refused(options, mentions, fields):
    with raises(UserError, *mentions, **fields):
        validate("m", DatasetConfig("geobench", options=options))


@pytest.mark.parametrize(
    ("dataset", "fields"),
    [
        (DatasetConfig("geobench", chip=4, options={"set": "m-eurosat"}), {"key": "datasets.m.chip", "allowed": ()}),
        (DatasetConfig("osm_landuse", task="classification"), {"key": "datasets.m.chip"}),
        (
            DatasetConfig(
                "osm_landuse",
                options={"a": 1},
                task="segmentation",
                chip=1,
                block=1,
                splits=SplitFractions(0.5, 0.25, 0.25),
            ),
            {"key": "datasets.m.options", "value": {"a": 1}},
        ),
    ],
    ids=["unknown key", "missing key", "source without options"],
)
def test_validate_keys_that_the_source_does_not_use_are_refused(dataset, fields):
    with raises(UserError, dataset.source, **fields):
        validate("m", dataset)
