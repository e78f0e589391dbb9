"""Files of GEO-Bench that were made to mislead, or are damaged as no copy is: refused by name, or left out."""

import json
import pickle

import h5py
import numpy as np
import pytest

from pipeline.data import image_writer
from pipeline.data.sources.geobench import unpickler
from pipeline.errors import UserError

BAND = "02 - Blue"


def band(make):
    """Damage: the band is made anew, by a function of the open file and the path of another one beside it."""

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


def virtual(file, other):
    layout = h5py.VirtualLayout((32, 32), np.float32)
    layout[:] = h5py.VirtualSource(f"{other}.h5", "band", (32, 32))
    file.create_virtual_dataset(BAND, layout)


def linked(link):
    def make(file, other):
        file[BAND] = link(f"{other}.h5")

    return make


def created(*shape_and_type, **options):
    return lambda file, other: file.create_dataset(BAND, *shape_and_type, **options)


def said(label):
    """Damage: the attribute is of another label, or is another pickle."""
    data = label if isinstance(label, bytes) else pickle.dumps({"label": label})

    def damage(path):
        with h5py.File(path, "r+", libver="latest") as file:
            file.attrs["pickle"] = str(data)

    return damage


def doubled(depth):
    made = [1]
    for _ in range(depth):
        made = [made, made]
    return made


FILES = {
    "a link to another file": (band(linked(lambda other: h5py.ExternalLink(other, "/band"))), "is a link"),
    "a link within": (band(linked(lambda other: h5py.SoftLink("/03 - Green"))), "is a link"),
    "a link to nothing": (band(linked(lambda other: h5py.SoftLink("/nothing"))), "is a link"),
    "another file's bytes": (
        band(lambda file, other: file.create_dataset(BAND, (32, 32), "f4", external=[(other, 0, 4096)])),
        "keeps pixels in other files",
    ),
    "another file's pixels": (band(virtual), "keeps pixels in other files"),
    "never written": (band(created((32, 32), "f4")), "pixels that were never written"),
    "never written, of another type": (band(created((32, 32), "f8")), "pixels that were never written"),
    "too large for any memory": (
        band(created((200_000, 200_000), "f4", chunks=(1000, 1000))), r"has the shape \(200000, 200000\)"
    ),
    "of no shape": (band(lambda file, other: file.create_dataset(BAND, data=h5py.Empty("f4"))), "id_000"),
    "a group": (band(lambda file, other: file.create_group(BAND)), "id_000"),
    "texts": (band(created((32, 32), h5py.string_dtype())), "id_000"),
    "lists": (band(created((32, 32), h5py.vlen_dtype("i4"))), "id_000"),
    "arrays": (band(created((32, 32), np.dtype("(2,)f4"))), "id_000"),
    "half a class": (said(2.7), "label is 2.7; labels are whole numbers"),
    "no class": (said(np.float32("nan")), "labels are whole numbers"),
    "a class as a text": (said("3"), "label is '3'; labels are whole numbers"),
    "a class that is too large": (said(10**30), "labels are whole numbers"),
    "lists without end": (said(doubled(60)), "labels are whole numbers"),
    "tuples without end": (said(b"\x80\x04})" + b"\x85" * 300_000 + b"Ns."), "more tuples than any such data"),
    "sets without end": (said(b"\x80\x04\x8f()" + b"\x85" * 300_000 + b"\x90."), "more tuples than any such data"),
    "a command to the terminal": (said(b"cos\x1b[31m\nsystem\n."), r"asks for 'os\\x1b\[31m.system'"),
}  # fmt: skip


@pytest.mark.parametrize("number", [0, 7])
@pytest.mark.parametrize("what", FILES)
def test_a_file_that_misleads_is_named_or_left_out(copied, stream, tmp_path, what, number):
    damage, words = FILES[what]
    root, folder = copied("m-so2sat")
    damage(folder / f"id_000{number}.hdf5")
    with pytest.raises(UserError, match=words) as refused:
        image_writer.write(stream(root, "m-so2sat"), tmp_path / "scratch", tmp_path / "store")
    assert f"id_000{number}.hdf5" in str(refused.value)
    assert len(str(refused.value)) < 1000
    made = stream(root, "m-so2sat", skip_bad=True)
    assert list(image_writer.write(made, tmp_path / "scratch", tmp_path / "store", skip_bad=True).skipped) == [
        f"id_000{number}"
    ]


@pytest.mark.parametrize("value", [0.12, 1e9, np.nan, np.inf])
def test_floats_in_a_set_of_whole_numbers_must_be_such(copied, stream, value):
    root, folder = copied("m-eurosat")
    made = stream(root, "m-eurosat")
    for given in (12.0, value):
        with h5py.File(folder / "id_0003.hdf5", "r+") as file:
            del file[BAND]
            file[BAND] = np.full((64, 64), given, np.float32)
        if given == 12.0:
            np.testing.assert_array_equal(made.read("id_0003").image[1], 12)
    with pytest.raises(UserError, match="id_0003.hdf5: its 02 - Blue has float32 values that do not fit into int16"):
        made.read("id_0003")


def test_of_several_dates_none_is_the_images(copied, stream):
    root, folder = copied("m-cashew-plantation")
    made = stream(root, "m-cashew-plantation")
    name = made.sample[0]
    assert not np.isnat(made.read(name).time)
    with h5py.File(folder / f"{name}.hdf5", "r+") as file:
        key = next(key for key in file if key.startswith("04 - Red"))
        file.move(key, "04 - Red_1999-05-05")
    assert np.isnat(made.read(name).time)


LISTS = {
    "half": ("m-bigearthnet", "label_stats.json", {"id_0000": [0.9] * 43}, "has 0.9 for the sample id_0000"),
    "a text": ("m-bigearthnet", "label_stats.json", {"id_0000": "1" * 43}, "must have a list for each"),
    "no numbers": ("m-bigearthnet", "label_stats.json", {"id_0000": [float("inf")]}, "labels are zeros and ones"),
    "a class twice": (
        "m-pv4ger",
        "label_map.json",
        {"00": []},
        "the class '00'; m-pv4ger has the classes 0 to 1",
    ),
    "a large class": ("m-pv4ger", "label_map.json", {"9" * 99: []}, "m-pv4ger has the classes 0 to 1"),
    "no names": ("m-pv4ger", "label_map.json", {"0": [[1]]}, r"lists '\[1\]' in 0, which is no name of a sample"),
}


@pytest.mark.parametrize("what", LISTS)
def test_labels_that_are_none(copied, stream, what):
    name, file, changed, words = LISTS[what]
    root, folder = copied(name)
    listed = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(listed | changed))
    with pytest.raises(UserError, match=f"{file} .*{words}"):
        stream(root, name)


@pytest.mark.parametrize("text", ['{"train": [], "train": ["id_0000"]}', "[" * 200_000, "{", "\x00"])
def test_lists_that_cannot_be_read(copied, stream, text):
    root, folder = copied("m-so2sat")
    (folder / "default_partition.json").write_text(text)
    with pytest.raises(UserError, match="default_partition.json is no JSON file that can be read"):
        stream(root, "m-so2sat")


def test_pickles_of_many_letters_are_read():
    data = {"notes": ["t" * 9000, ("a", ("b", ("c",)))]}
    assert unpickler.loads(pickle.dumps(data)) == data
