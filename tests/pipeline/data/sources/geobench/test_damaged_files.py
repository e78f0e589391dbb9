"""Damaged or hostile files, lists and options are refused with an error that names them, or skipped."""

import json
import os
import pickle

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
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(key=None, values=None, attribute=None):
    """Damage a sample: delete a key or replace its values, and replace the attribute 'pickle'."""

    def damage(path):
        with h5py.File(path, "r+", libver="latest") as file:
            if key:
                del file[key]
            if values is not None:
                file[key] = values
            if attribute is not None:
                file.attrs["pickle"] = attribute

    return damage


def replace_label(label):
    """Damage a sample: replace the attribute by a pickle of `label`, or by the pickle `label`."""
    return change(attribute=str(label if isinstance(label, bytes) else pickle.dumps({"label": label})))


def replace_band(make):
    """Damage a sample: create a band with `make(open file, path of another file without suffix)`."""

    def damage(path):
        other = path.parent.parent / "other"
        with h5py.File(f"{other}.h5", "w") as file:
            file["padding"] = np.zeros(1000)
            file["band"] = np.full((32, 32), 7, np.float32)
        other.write_bytes(b"SECRET!!" * 1024)
        with h5py.File(path, "r+") as file:
            del file[BAND]
            make(file, str(other))

    return damage


def make_virtual(file, other):
    layout = h5py.VirtualLayout((32, 32), np.float32)
    layout[:] = h5py.VirtualSource(f"{other}.h5", "band", (32, 32))
    file.create_virtual_dataset(BAND, layout)


def link_band(link):
    return replace_band(lambda file, other: file.__setitem__(BAND, link(f"{other}.h5")))


def create_band(*shape_and_dtype, **options):
    return replace_band(lambda file, other: file.create_dataset(BAND, *shape_and_dtype, **options))


def attack(path):
    replace_label(Call(os.system, f"touch {path.parent.parent / 'ran'}"))(path)


def doubled(depth):
    """List of two references to a list of two references …: 2 to the power of `depth` elements."""
    nested = [1]
    for _ in range(depth):
        nested = [nested, nested]
    return nested


# Damage of a sample, and the fields of the error; none where HDF5 itself refuses the file.
DAMAGE = {
    "truncated": (truncate, {}),
    "missing": (lambda path: path.unlink(), {}),
    "band missing": (change("11 - SWIR"), {"key": "11 - SWIR"}),
    "wrong shape": (change(BAND, np.zeros((32, 31), np.float32)), {"key": BAND, "value": (32, 31)}),
    "wrong shape, same size": (change(BAND, np.zeros((16, 64), np.float32)), {"key": BAND, "value": (16, 64)}),
    "label out of range": (replace_label(17), {"key": "label", "value": 17, "allowed": range(17)}),
    "no label": (change(attribute=str(pickle.dumps({}))), {"key": "label", "value": None}),
    "attack": (attack, {"key": "pickle", "value": "posix.system"}),
    "attribute is code": (change(attribute="open('x')"), {"key": "pickle"}),
    "attribute is an array": (change(attribute=np.zeros(3)), {"key": "pickle"}),
    "attribute is truncated": (change(attribute=np.bytes_(b"b'x")), {"key": "pickle"}),
    "pickle is truncated": (change(attribute=str(pickle.dumps({"label": 1})[:-4])), {"key": "pickle"}),
    "link to another file": (link_band(lambda other: h5py.ExternalLink(other, "/band")), {"key": BAND}),
    "link within the file": (link_band(lambda other: h5py.SoftLink("/03 - Green")), {"key": BAND}),
    "bytes of another file": (
        replace_band(lambda file, other: file.create_dataset(BAND, (32, 32), "f4", external=[(other, 0, 4096)])),
        {"key": BAND, "value": "external"},
    ),
    "virtual dataset": (replace_band(make_virtual), {"key": BAND, "value": "external"}),
    "never written": (create_band((32, 32), "f4"), {"key": BAND, "value": "not allocated"}),
    "larger than memory": (
        create_band((200_000, 200_000), "f4", chunks=(1000, 1000)), {"key": BAND, "value": (200_000, 200_000)}
    ),
    "empty dataset": (create_band(data=h5py.Empty("f4")), {"key": BAND, "value": None}),
    "group": (replace_band(lambda file, other: file.create_group(BAND)), {}),
    "texts": (create_band((32, 32), h5py.string_dtype()), {"key": BAND}),
    "arrays": (create_band((32, 32), np.dtype("(2,)f4")), {"key": BAND}),
    "fractional class": (replace_label(2.7), {"key": "label", "value": "2.7"}),
    "NaN class": (replace_label(np.float32("nan")), {"key": "label"}),
    "class as text": (replace_label("3"), {"key": "label", "value": "'3'"}),
    "class larger than int64": (replace_label(10**30), {"key": "label"}),
    "list of 2**60 elements": (replace_label(doubled(60)), {"key": "label"}),
    "deeply nested tuples": (replace_label(b"\x80\x04})" + b"\x85" * 300_000 + b"Ns."), {"key": "pickle"}),
    "deeply nested sets": (replace_label(b"\x80\x04\x8f()" + b"\x85" * 300_000 + b"\x90."), {"key": "pickle"}),
    "control characters": (
        replace_label(b"cos\x1b[31m\nsystem\n."), {"key": "pickle", "value": "os\x1b[31m.system"}
    ),
}  # fmt: skip
# Damage that the first file reveals before a pixel is read.
DAMAGED_HEADERS = ("truncated", "band missing", "texts")


@pytest.mark.parametrize("kind", DAMAGE)
def test_reader_damaged_or_hostile_file_is_refused(copy_set, open_set, kind):
    damage, fields = DAMAGE[kind]
    root, folder = copy_set("m-so2sat")
    path = folder / "id_0007.hdf5"
    damage(path)
    with raises(UserError, path, path=path, **fields) as info:
        open_set(root, "m-so2sat").read_sample("id_0007")
    assert len(str(info.value)) < 1000
    assert str(info.value).isprintable()
    assert not (folder.parent / "ran").exists()


@pytest.mark.parametrize("kind", DAMAGED_HEADERS)
def test_prepare_damaged_first_file_is_refused_or_skipped(copy_set, open_set, kind):
    damage, fields = DAMAGE[kind]
    root, folder = copy_set("m-so2sat")
    damage(folder / "id_0000.hdf5")
    with raises(UserError, path=folder / "id_0000.hdf5", **fields):
        open_set(root, "m-so2sat")
    assert open_set(root, "m-so2sat", skip_bad=True).dtype == np.float32


def test_write_damaged_files_are_skipped(copy_set, open_set, tmp_path):
    root, folder = copy_set("m-so2sat")
    truncate(folder / "id_0000.hdf5")
    attack(folder / "id_0003.hdf5")
    change(BAND, np.full((32, 32), np.nan, np.float32))(folder / "id_0007.hdf5")
    images = open_set(root, "m-so2sat", skip_bad=True)
    with raises(UserError, "id_0000"):
        image_writer.write(images, tmp_path / "scratch", tmp_path / "store")
    assert not (tmp_path / "store").exists()
    summary = image_writer.write(images, tmp_path / "scratch", tmp_path / "store", skip_bad=True)
    assert list(summary.skipped) == ["id_0000", "id_0003", "id_0007"]
    assert summary.counts == {"train": 4, "val": 3, "test": 4}
    store = image_store.open_images(tmp_path / "store")
    assert list(store.attrs["skipped"]) == list(summary.skipped)
    assert store.sample.values[5] == "id_0008"
    np.testing.assert_array_equal(store.image[5], images.read_sample("id_0008").image)
    for path in folder.glob("*.hdf5"):
        truncate(path)
    with raises(UserError, folder):
        open_set(root, "m-so2sat", skip_bad=True)


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
    ("dtype", "values"),
    [("u1", [2]), ("<i8", [-1, -(2**63)]), (">i4", [1 << 24]), ("f4", [-1.0, 0.5, 256.0]), ("?", [])],
)
def test_reader_mask_with_an_invalid_value_is_refused(copy_set, open_set, dtype, values):
    root, folder = copy_set("m-pv4ger-seg")
    images = open_set(root, "m-pv4ger-seg")
    name = images.sample[0]
    path = folder / f"{name}.hdf5"
    mask = np.zeros((320, 320), dtype)
    mask[:40, :40] = 1
    change("label", mask)(path)
    np.testing.assert_array_equal(images.read_sample(name).label, mask)
    for value in values:
        mask[100, 200] = value
        change("label", mask)(path)
        with raises(UserError, value, "m-pv4ger-seg", key="label", value=[value], allowed=[0, 1], path=path):
            images.read_sample(name)


def test_reader_floats_in_a_set_of_integers_must_be_integers_in_range(copy_set, open_set):
    root, folder = copy_set("m-eurosat")
    images = open_set(root, "m-eurosat")
    path = folder / "id_0003.hdf5"
    change(BAND, np.full((64, 64), 12.0, np.float32))(path)
    np.testing.assert_array_equal(images.read_sample("id_0003").image[1], 12)
    for value in (0.12, 1e9, np.nan, np.inf):
        change(BAND, np.full((64, 64), value, np.float32))(path)
        with raises(UserError, key=BAND, value="float32", allowed=["int16"], path=path):
            images.read_sample("id_0003")


# Lists of samples, labels and statistics


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


SPLITS = ("train", "valid", "test")


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        ({"train": ["../id_0000"], "valid": [], "test": []}, {"key": "train", "value": "../id_0000"}),
        ({"train": [], "valid": ["id_0000", 1], "test": []}, {"key": "valid", "value": 1}),
        ({"train": {"id_0000": 1}, "valid": [], "test": []}, {"key": "train", "value": {"id_0000": 1}}),
        ({split: [] for split in (*SPLITS, "more")}, {"value": [*SPLITS, "more"], "allowed": SPLITS}),
        (["id_0000"], {"value": [], "allowed": SPLITS}),
        ('{"train": [], "train": ["id_0000"]}', {}),
        ("[" * 200_000, {}),
        ("{", {}),
    ],
    ids=["path as name", "number as name", "no list", "unknown split", "list", "repeated key", "deep", "{"],
)
def test_read_partition_with_another_structure_is_refused(tmp_path, content, fields):
    path = tmp_path / "default_partition.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with raises(UserError, path, path=path, **fields):
        partitions.read_partition(tmp_path, "default", skip_bad=False)


@pytest.mark.parametrize(
    ("name", "file", "entries", "fields"),
    [
        ("m-bigearthnet", "label_stats.json", {"id_0000": [0.9] * 43}, {"key": "id_0000", "value": 0.9}),
        ("m-bigearthnet", "label_stats.json", {"id_0000": "1" * 43}, {}),
        ("m-bigearthnet", "label_stats.json", {"id_0000": [float("inf")]}, {"key": "id_0000", "allowed": (0, 1)}),
        ("m-pv4ger", "label_map.json", {"00": []}, {"value": "00", "allowed": ("0", "1")}),
        ("m-pv4ger", "label_map.json", {"9" * 99: []}, {"value": "9" * 99, "allowed": ("0", "1")}),
        ("m-pv4ger", "label_map.json", {"0": [[1]]}, {"key": "0", "value": [1]}),
    ],
    ids=["fraction", "text", "infinity", "class twice", "large class", "list as name"],
)
def test_read_labels_invalid_json_is_refused(tmp_path, name, file, entries, fields):
    path = tmp_path / file
    path.write_text(json.dumps(entries))
    with raises(UserError, path, path=path, **fields):
        partitions.read_labels(tmp_path, geobench.SETS[name])


# Options


@pytest.mark.parametrize(
    ("options", "mentions", "fields"),
    [
        ({"set": "m-eurosta"}, ["m-bigearthnet"], {"key": "set", "value": "m-eurosta"}),
        ({"set": "m-so2sat", "bands": ["thermal"]}, ["sar_vh_real"], {"key": "bands", "value": ["thermal"]}),
        ({"set": "m-NeonTree", "ignore_nodata": True}, ["m-NeonTree"], {"key": "ignore_nodata"}),
        ({"set": "m-so2sat", "as_labeled": True}, ["as_labeled"], {"key": "as_labeled"}),
        ({}, ["set"], {"key": "set"}),
    ],
    ids=["unknown set", "unknown band", "no class no data", "unknown option", "no set"],
)
def test_validate_invalid_options_are_refused(options, mentions, fields):
    fields["key"] = f"datasets.m.options.{fields['key']}"
    with raises(UserError, *mentions, **fields):
        validate("m", DatasetConfig("geobench", options=options))
