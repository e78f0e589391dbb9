"""Files that were made to mislead the reader are refused by name, or skipped."""

import json
import pickle

import h5py
import numpy as np
import pytest

from pipeline.data import image_writer
from pipeline.data.sources.geobench import unpickler
from pipeline.errors import UserError
from tests.errors import raises

BAND = "02 - Blue"


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


def make_link(link):
    def make(file, other):
        file[BAND] = link(f"{other}.h5")

    return make


def make_dataset(*shape_and_dtype, **options):
    return lambda file, other: file.create_dataset(BAND, *shape_and_dtype, **options)


def replace_label(label):
    """Damage a sample: replace the attribute by a pickle of `label`, or by the pickle `label`."""
    data = label if isinstance(label, bytes) else pickle.dumps({"label": label})

    def damage(path):
        with h5py.File(path, "r+", libver="latest") as file:
            file.attrs["pickle"] = str(data)

    return damage


def doubled(depth):
    """List of two references to a list of two references …: 2 to the power of `depth` elements."""
    nested = [1]
    for _ in range(depth):
        nested = [nested, nested]
    return nested


# Damage of a sample, and the fields of the error; none where HDF5 itself refuses the file.
FILES = {
    "link to another file": (replace_band(make_link(lambda other: h5py.ExternalLink(other, "/band"))), {"key": BAND}),
    "link within the file": (replace_band(make_link(lambda other: h5py.SoftLink("/03 - Green"))), {"key": BAND}),
    "broken link": (replace_band(make_link(lambda other: h5py.SoftLink("/nothing"))), {"key": BAND}),
    "bytes of another file": (
        replace_band(lambda file, other: file.create_dataset(BAND, (32, 32), "f4", external=[(other, 0, 4096)])),
        {"key": BAND, "value": "external"},
    ),
    "virtual dataset": (replace_band(make_virtual), {"key": BAND, "value": "external"}),
    "never written": (replace_band(make_dataset((32, 32), "f4")), {"key": BAND, "value": "not allocated"}),
    "never written, other dtype": (
        replace_band(make_dataset((32, 32), "f8")), {"key": BAND, "value": "not allocated"}
    ),
    "larger than memory": (
        replace_band(make_dataset((200_000, 200_000), "f4", chunks=(1000, 1000))),
        {"key": BAND, "value": (200_000, 200_000)},
    ),
    "empty dataset": (
        replace_band(lambda file, other: file.create_dataset(BAND, data=h5py.Empty("f4"))),
        {"key": BAND, "value": None},
    ),
    "group": (replace_band(lambda file, other: file.create_group(BAND)), {}),
    "texts": (replace_band(make_dataset((32, 32), h5py.string_dtype())), {"key": BAND}),
    "lists": (replace_band(make_dataset((32, 32), h5py.vlen_dtype("i4"))), {"key": BAND}),
    "arrays": (replace_band(make_dataset((32, 32), np.dtype("(2,)f4"))), {"key": BAND}),
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


@pytest.mark.parametrize("number", [0, 7], ids=["first file", "later file"])
@pytest.mark.parametrize("kind", FILES)
def test_write_hostile_file_is_named_or_skipped(copy_set, open_set, tmp_path, kind, number):
    damage, fields = FILES[kind]
    root, folder = copy_set("m-so2sat")
    path = folder / f"id_000{number}.hdf5"
    damage(path)
    with raises(UserError, path, path=path, **fields) as info:
        image_writer.write(open_set(root, "m-so2sat"), tmp_path / "scratch", tmp_path / "store")
    assert len(str(info.value)) < 1000
    assert str(info.value).isprintable()
    images = open_set(root, "m-so2sat", skip_bad=True)
    summary = image_writer.write(images, tmp_path / "scratch", tmp_path / "store", skip_bad=True)
    assert list(summary.skipped) == [f"id_000{number}"]


@pytest.mark.parametrize("value", [0.12, 1e9, np.nan, np.inf])
def test_reader_floats_in_a_set_of_integers_must_be_integers_in_range(copy_set, open_set, value):
    root, folder = copy_set("m-eurosat")
    images = open_set(root, "m-eurosat")
    path = folder / "id_0003.hdf5"

    def replace_blue(value):
        with h5py.File(path, "r+") as file:
            del file[BAND]
            file[BAND] = np.full((64, 64), value, np.float32)

    replace_blue(12.0)
    np.testing.assert_array_equal(images.read_sample("id_0003").image[1], 12)
    replace_blue(value)
    with raises(UserError, key=BAND, value="float32", allowed=["int16"], path=path):
        images.read_sample("id_0003")


def test_reader_bands_of_several_dates_give_no_date(copy_set, open_set):
    root, folder = copy_set("m-cashew-plantation")
    images = open_set(root, "m-cashew-plantation")
    name = images.sample[0]
    assert not np.isnat(images.read_sample(name).time)
    with h5py.File(folder / f"{name}.hdf5", "r+") as file:
        key = next(key for key in file if key.startswith("04 - Red"))
        file.move(key, "04 - Red_1999-05-05")
    assert np.isnat(images.read_sample(name).time)


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
def test_read_labels_invalid_json_is_refused(copy_set, open_set, name, file, entries, fields):
    root, folder = copy_set(name)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with raises(UserError, path, path=path, **fields):
        open_set(root, name)


@pytest.mark.parametrize("text", ['{"train": [], "train": ["id_0000"]}', "[" * 200_000, "{", "\x00"])
def test_read_partition_unreadable_json_is_refused(copy_set, open_set, text):
    root, folder = copy_set("m-so2sat")
    path = folder / "default_partition.json"
    path.write_text(text)
    with raises(UserError, path, path=path):
        open_set(root, "m-so2sat")


def test_unpickler_texts_with_the_bytes_of_tuple_opcodes_are_read():
    data = {"notes": ["t" * 9000, ("a", ("b", ("c",)))]}
    assert unpickler.loads(pickle.dumps(data)) == data
