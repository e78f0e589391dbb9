"""Damaged or hostile files, lists and options are refused with an error that names them, or skipped."""

import json
import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.config import DatasetConfig
from pipeline.data import image_store, image_writer
from pipeline.data.sources import geobench, validate
from pipeline.data.sources.geobench import partitions
from pipeline.errors import UserError
from tests.errors import raises
from tests.pipeline.data.sources.geobench.conftest import Call

BAND = "02 - Blue"


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def replace(path, key, values):
    with h5py.File(path, "r+") as file:
        del file[key]
        file[key] = values


def band(*shape_and_dtype, **options):
    """Damage: a new dataset in place of a band."""
    return lambda file, other: file.create_dataset(BAND, *shape_and_dtype, **options)


def virtual_band(file, other):
    layout = h5py.VirtualLayout((32, 32), np.float32)
    layout[:] = h5py.VirtualSource(other, "band", (32, 32))
    file.create_virtual_dataset(BAND, layout)


def link(make):
    """Damage: a link in place of a band, from the path of another file."""
    return lambda file, other: file.__setitem__(BAND, make(other))


def attribute(value):
    """Damage: another attribute 'pickle', a pickle of `value` if it is an object."""
    text = value if isinstance(value, str | np.ndarray | np.bytes_) else str(pickle.dumps(value))
    return lambda file, other: file.attrs.__setitem__("pickle", text)


def attack(file, other):
    attribute(Call(os.system, f"touch {other}.ran"))(file, other)


# A list of two references to a list of two references …
DOUBLED: list = [1]
for _ in range(60):
    DOUBLED = [DOUBLED, DOUBLED]
# Functions that damage a file without the band, given the path of another file, and the fields of the error.
DAMAGED_BANDS = {
    "band missing": (lambda file, other: None, {"key": BAND}),
    "wrong shape": (band(data=np.zeros((32, 31), np.float32)), {"key": BAND, "value": (32, 31)}),
    "wrong shape, same size": (band(data=np.zeros((16, 64), np.float32)), {"key": BAND, "value": (16, 64)}),
    "link to another file": (link(lambda other: h5py.ExternalLink(other, "/band")), {"key": BAND}),
    "link within the file": (link(lambda other: h5py.SoftLink("/03 - Green")), {"key": BAND}),
    "bytes of another file": (
        lambda file, other: file.create_dataset(BAND, (32, 32), "f4", external=[(other, 0, 4096)]),
        {"key": BAND, "value": "external"},
    ),
    "virtual dataset": (virtual_band, {"key": BAND, "value": "external"}),
    "never written": (band((32, 32), "f4"), {"key": BAND, "value": "not allocated"}),
    "larger than memory": (band((200_000, 200_000), "f4", chunks=(1000, 1000)), {"value": (200_000, 200_000)}),
    "empty dataset": (band(data=h5py.Empty("f4")), {"key": BAND, "value": None}),
    "group": (lambda file, other: file.create_group(BAND), {}),
    "texts": (band((32, 32), h5py.string_dtype()), {"key": BAND}),
    "arrays": (band((32, 32), np.dtype("(2,)f4")), {"key": BAND}),
}
DAMAGED_ATTRIBUTES = {
    "no label": (attribute({}), {"key": "label", "value": None}),
    "label out of range": (attribute({"label": 17}), {"key": "label", "value": 17, "allowed": range(17)}),
    "fractional class": (attribute({"label": 2.7}), {"key": "label", "value": "2.7"}),
    "NaN class": (attribute({"label": np.float32("nan")}), {"key": "label"}),
    "class as text": (attribute({"label": "3"}), {"key": "label", "value": "'3'"}),
    "class larger than int64": (attribute({"label": 10**30}), {"key": "label"}),
    "list of 2**60 elements": (attribute({"label": DOUBLED}), {"key": "label"}),
    "attack": (attack, {"key": "pickle", "value": "posix.system"}),
    "attribute is code": (attribute("open('x')"), {"key": "pickle"}),
    "attribute is an array": (attribute(np.zeros(3)), {"key": "pickle"}),
    "attribute is truncated": (attribute(np.bytes_(b"b'x")), {"key": "pickle"}),
    "pickle is truncated": (attribute(str(pickle.dumps({"label": 1})[:-4])), {"key": "pickle"}),
    "nested tuples": (attribute(str(b"\x80\x04})" + b"\x85" * 300_000 + b"Ns.")), {"key": "pickle"}),
    "nested sets": (attribute(str(b"\x80\x04\x8f()" + b"\x85" * 300_000 + b"\x90.")), {"key": "pickle"}),
    "control characters": (attribute(str(b"cos\x1b[31m\nsystem\n.")), {"value": "os\x1b[31m.system"}),
}


@pytest.mark.parametrize("kind", DAMAGED_BANDS | DAMAGED_ATTRIBUTES)
def test_reader_damaged_or_hostile_file_is_refused(copy_set, open_set, kind):
    damage, fields = (DAMAGED_BANDS | DAMAGED_ATTRIBUTES)[kind]
    path = copy_set("m-so2sat") / "id_0007.hdf5"
    other = path.with_name("other")
    with h5py.File(other, "w") as file:
        file["band"] = np.full((32, 32), 7, np.float32)
    with h5py.File(path, "r+", libver="latest") as file:
        if kind in DAMAGED_BANDS:
            del file[BAND]
        damage(file, str(other))
    with raises(UserError, path, path=path, **fields) as info:
        open_set("m-so2sat").read_sample("id_0007")
    assert len(str(info.value)) < 1000
    assert str(info.value).isprintable()
    assert not path.with_name("other.ran").exists()


def test_write_damaged_files_are_refused_or_skipped(copy_set, open_set, tmp_path):
    folder = copy_set("m-so2sat")
    truncate(folder / "id_0000.hdf5")
    (folder / "id_0003.hdf5").unlink()
    replace(folder / "id_0007.hdf5", BAND, np.full((32, 32), np.nan, np.float32))
    with raises(UserError, path=folder / "id_0000.hdf5"):
        open_set("m-so2sat")
    images = open_set("m-so2sat", skip_bad=True)
    assert images.dtype == np.float32
    with raises(UserError, path=folder / "id_0003.hdf5"):
        images.read_sample("id_0003")
    summary = image_writer.write(images, tmp_path / "scratch", tmp_path / "store", skip_bad=True)
    assert list(summary.skipped) == ["id_0000", "id_0003", "id_0007"]
    assert summary.counts == {"train": 4, "val": 3, "test": 4}
    assert image_store.open_images(tmp_path / "store").sizes["sample"] == 11
    for damage, fields in ((truncate, {}), (Path.unlink, {"path": folder})):
        for path in folder.glob("*.hdf5"):
            damage(path)
        with raises(UserError, folder, **fields):
            open_set("m-so2sat", skip_bad=True)


def test_reader_label_that_contradicts_the_json_file_is_refused(copy_set, open_set):
    folder = copy_set("m-pv4ger")
    path = folder / "label_map.json"
    samples_of_class = json.loads(path.read_text())
    moved = samples_of_class["0"].pop()
    samples_of_class["1"].append(moved)
    path.write_text(json.dumps(samples_of_class))
    with raises(UserError, key="label", value=0, allowed=[1], path=folder / f"{moved}.hdf5"):
        open_set("m-pv4ger").read_sample(moved)
    samples_of_class["0"].append(moved)
    path.write_text(json.dumps(samples_of_class))
    with raises(UserError, moved, value=moved, path=path):
        open_set("m-pv4ger")


@pytest.mark.parametrize(
    ("dtype", "values"),
    [("u1", [2]), ("<i8", [-1, -(2**63)]), (">i4", [1 << 24]), ("f4", [-1.0, 0.5, 256.0]), ("?", [])],
)
def test_reader_mask_with_an_invalid_value_is_refused(copy_set, open_set, dtype, values):
    folder = copy_set("m-pv4ger-seg")
    images = open_set("m-pv4ger-seg")
    path = folder / f"{images.sample[0]}.hdf5"
    mask = np.zeros((320, 320), dtype)
    mask[:40, :40] = 1
    replace(path, "label", mask)
    np.testing.assert_array_equal(images.read_sample(path.stem).label, mask)
    for value in values:
        mask[100, 200] = value
        replace(path, "label", mask)
        with raises(UserError, value, "m-pv4ger-seg", key="label", value=[value], allowed=[0, 1], path=path):
            images.read_sample(path.stem)


def test_reader_floats_in_a_set_of_integers_must_be_integers_in_range(copy_set, open_set):
    folder = copy_set("m-eurosat")
    images = open_set("m-eurosat")
    path = folder / "id_0003.hdf5"
    replace(path, BAND, np.full((64, 64), 12.0, np.float32))
    np.testing.assert_array_equal(images.read_sample("id_0003").image[1], 12)
    for value in (0.12, 1e9, np.nan, np.inf):
        replace(path, BAND, np.full((64, 64), value, np.float32))
        with raises(UserError, key=BAND, value="float32", allowed=["int16"], path=path):
            images.read_sample("id_0003")


@pytest.mark.parametrize("split", ["train", "test"])
def test_read_partition_repeated_sample_is_refused_or_dropped(copy_set, open_set, split):
    folder = copy_set("m-so2sat")
    path = folder / "default_partition.json"
    partition = json.loads(path.read_text())
    partition[split].append("id_0000")
    path.write_text(json.dumps(partition))
    with raises(UserError, "train", split, key=split, value="id_0000", path=path):
        open_set("m-so2sat")
    images = open_set("m-so2sat", skip_bad=True)
    assert images.sample.count("id_0000") == 1
    assert images.split[images.sample.index("id_0000")] == "train"
    assert any(f"id_0000 in {split}" in note for note in images.notes)


NO_SAMPLES = {"train": [], "valid": [], "test": []}
SPLITS = tuple(NO_SAMPLES)
PARTITION, MAP, STATS = "default_partition.json", "label_map.json", "label_stats.json"


@pytest.mark.parametrize(
    ("name", "content", "fields"),
    [
        (PARTITION, NO_SAMPLES | {"train": ["../id_0000"]}, {"key": "train", "value": "../id_0000"}),
        (PARTITION, NO_SAMPLES | {"valid": ["id_0000", 1]}, {"key": "valid", "value": 1}),
        (PARTITION, NO_SAMPLES | {"train": {"id_0000": 1}}, {"key": "train", "value": {"id_0000": 1}}),
        (PARTITION, NO_SAMPLES | {"more": []}, {"value": [*SPLITS, "more"], "allowed": SPLITS}),
        (PARTITION, ["id_0000"], {"value": [], "allowed": SPLITS}),
        (PARTITION, '{"train": [], "train": ["id_0000"]}', {}),
        (PARTITION, "[" * 200_000, {}),
        (STATS, {"id_0000": [0.9] * 43}, {"key": "id_0000", "value": 0.9}),
        (STATS, {"id_0000": "1" * 43}, {}),
        (STATS, {"id_0000": [float("inf")]}, {"key": "id_0000", "allowed": (0, 1)}),
        (MAP, {"00": []}, {"value": "00", "allowed": ("0", "1")}),
        (MAP, {"9" * 99: []}, {"value": "9" * 99, "allowed": ("0", "1")}),
        (MAP, {"0": [[1]]}, {"key": "0", "value": [1]}),
        (MAP, "{", {}),
    ],
)
def test_json_file_with_another_structure_is_refused(tmp_path, name, content, fields):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with raises(UserError, path, path=path, **fields):
        if name == PARTITION:
            partitions.read_partition(tmp_path, "default", skip_bad=False)
        else:
            partitions.read_labels(tmp_path, geobench.SETS["m-bigearthnet" if name == STATS else "m-pv4ger"])


@pytest.mark.parametrize(
    ("options", "mentions", "fields"),
    [
        ({"set": "m-eurosta"}, ["m-bigearthnet"], {"key": "set", "value": "m-eurosta"}),
        ({"set": "m-so2sat", "bands": ["thermal"]}, ["sar_vh_real"], {"key": "bands", "value": ["thermal"]}),
        ({"set": "m-NeonTree", "ignore_nodata": True}, ["m-NeonTree"], {"key": "ignore_nodata"}),
        ({"set": "m-so2sat", "as_labeled": True}, ["as_labeled"], {"key": "as_labeled"}),
        ({}, ["set"], {"key": "set"}),
    ],
)
def test_validate_invalid_options_are_refused(options, mentions, fields):
    fields["key"] = f"datasets.m.options.{fields['key']}"
    with raises(UserError, *mentions, **fields):
        validate("m", DatasetConfig("geobench", options=options))
