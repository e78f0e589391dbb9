"""What GEO-Bench's files and options may have wrong: an error that names the file, or left out when asked."""

import dataclasses
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


def test_a_list_that_contradicts_a_file_is_refused(copied, stream):
    root, folder = copied("m-pv4ger")
    listed = json.loads((folder / "label_map.json").read_text())
    moved = listed["0"].pop()
    listed["1"].append(moved)
    (folder / "label_map.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match=f"{moved}.hdf5: its label is 0 in the file and 1 in the folder's JSON"):
        stream(root, "m-pv4ger").read(moved)
    listed["0"].append(moved)
    (folder / "label_map.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match="label_map.json lists the sample .* more than once"):
        stream(root, "m-pv4ger")


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(key=None, values=None, attribute=None):
    def damage(path):
        with h5py.File(path, "r+") as file:
            if key:
                del file[key]
            if values is not None:
                file[key] = values
            if attribute is not None:
                file.attrs["pickle"] = attribute

    return damage


def attack(path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {path.parent.parent / 'ran'}",)

    change(attribute=str(pickle.dumps({"label": Attack()})))(path)


DAMAGE = {
    "truncated": (cut_short, "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "gone": (lambda path: path.unlink(), "There is no .* though the partition lists it"),
    "a band missing": (change("11 - SWIR"), "lacks 11 - SWIR; it has"),
    "a wrong shape": (change("02 - Blue", np.zeros((32, 31), np.float32)), r"02 - Blue has the shape \(32, 31\)"),
    "no numbers": (change("02 - Blue", np.full((32, 32), np.nan, np.float32)), "no finite numbers"),
    "a label outside": (change(attribute=str(pickle.dumps({"label": 17}))), "label is 17; m-so2sat has .* 0 to 16"),
    "no label": (change(attribute=str(pickle.dumps({}))), "it has no label"),
    "an attack": (attack, "asks for posix.system, which is no part of such data"),
    "no pickle": (change(attribute="open('x')"), "no attribute 'pickle' that is the text of bytes"),
    "a pickle of numbers": (change(attribute=np.zeros(3)), "no attribute 'pickle' that is the text of bytes"),
    "a torn text": (change(attribute=np.bytes_(b"b'x")), "no attribute 'pickle' that is the text of bytes"),
    "a band of as many pixels": (change("02 - Blue", np.zeros((16, 64), np.float32)), r"the shape \(16, 64\)"),
    "a band of records": (change("02 - Blue", np.zeros((32, 32), [("a", "f4"), ("b", "f4")])), "pixels are numbers"),
    "a torn pickle": (change(attribute=str(pickle.dumps({"label": 1})[:-4])), "pickle cannot be read"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_named_or_left_out(copied, stream, tmp_path, what):
    damage, words = DAMAGE[what]
    root, folder = copied("m-so2sat")
    damage(folder / "id_0007.hdf5")
    made = stream(root, "m-so2sat")
    with pytest.raises(UserError, match=words) as refused:
        image_writer.write(made, tmp_path / "scratch", tmp_path / "store")
    assert "id_0007" in str(refused.value)
    assert not (tmp_path / "store").exists()
    written = image_writer.write(made, tmp_path / "scratch", tmp_path / "store", skip_bad=True)
    assert list(written.skipped) == ["id_0007"]
    assert written.counts == {"train": 6, "val": 3, "test": 4}
    store = image_store.open_images(tmp_path / "store")
    assert "id_0007" in store.attrs["skipped"]
    assert "id_0007" not in store.sample.values
    np.testing.assert_array_equal(store.image[7], made.read("id_0008").image)
    assert not (folder.parent / "ran").exists()


def test_the_first_file_may_be_the_damaged_one(copied, stream, tmp_path):
    root, folder = copied("m-so2sat")
    for number in (0, 1):
        cut_short(folder / f"id_000{number}.hdf5")
    with pytest.raises(UserError, match="id_0000.hdf5 cannot be read"):
        stream(root, "m-so2sat")
    made = stream(root, "m-so2sat", skip_bad=True)
    written = image_writer.write(made, tmp_path / "scratch", tmp_path / "store", skip_bad=True)
    assert list(written.skipped) == ["id_0000", "id_0001"]
    for path in folder.glob("*.hdf5"):
        cut_short(path)
    with pytest.raises(UserError, match="cannot be read"):
        stream(root, "m-so2sat", skip_bad=True)


def test_a_mask_with_strange_values_is_refused(copied, stream):
    root, folder = copied("m-pv4ger-seg")
    made = stream(root, "m-pv4ger-seg")
    strange = {
        "u1": (2, 255),
        "<i8": (-1, -(2**63), 2),
        ">i4": (-1, 1 << 24),
        "f4": (-1.0, 0.5, 2.0),
        "f8": (-1.0, 256.0),
    }
    for kind, values in strange.items():
        for value in values:
            mask = np.zeros((320, 320), kind)
            change("label", mask)(folder / f"{made.sample[0]}.hdf5")
            np.testing.assert_array_equal(made.read(made.sample[0]).label, 0)
            mask[100, 200] = value
            change("label", mask)(folder / f"{made.sample[0]}.hdf5")
            with pytest.raises(UserError, match=rf"label has \[{value}\]; m-pv4ger-seg has the classes 0 to 1"):
                made.read(made.sample[0])


def test_a_mask_may_be_true_and_false(copied, stream):
    root, folder = copied("m-pv4ger-seg")
    made = stream(root, "m-pv4ger-seg")
    mask = np.zeros((320, 320), bool)
    mask[:40, :40] = True
    change("label", mask)(folder / f"{made.sample[0]}.hdf5")
    np.testing.assert_array_equal(made.read(made.sample[0]).label, mask)


@pytest.mark.parametrize(("split", "words"), [("train", "twice in train"), ("test", "in train and in test")])
def test_a_sample_listed_twice(copied, stream, split, words):
    root, folder = copied("m-so2sat")
    path = folder / "default_partition.json"
    partition = json.loads(path.read_text())
    partition[split].append("id_0000")
    path.write_text(json.dumps(partition))
    with pytest.raises(UserError, match=f"default_partition.json lists the sample id_0000 {words}"):
        stream(root, "m-so2sat")
    skipped = stream(root, "m-so2sat", skip_bad=True)
    assert skipped.sample.count("id_0000") == 1
    assert any(f"id_0000 of {split}" in note for note in skipped.notes)


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ({"train": ["../../m-eurosat/id_0000"]}, "lists '../../m-eurosat/id_0000' in train, which is no name"),
        ({"train": ["id_0000", 1]}, "lists '1' in train"),
        ({"train": {"id_0000": 1}}, "must list the names of samples in train"),
        ({"train": None, "more": []}, "it lists train, valid, test, more"),
        (["id_0000"], "it lists none of them"),
        (7, "it lists none of them"),
    ],
)
def test_partitions_that_are_none(copied, stream, listed, words):
    root, folder = copied("m-so2sat")
    path = folder / "default_partition.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | listed if isinstance(listed, dict) else listed))
    with pytest.raises(UserError, match=words):
        stream(root, "m-so2sat")


def test_statistics_that_are_none(copied, stream):
    root, folder = copied("m-cashew-plantation")
    path = folder / "band_stats.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"label": {"mean": None}, "01": {"std": 1.0}}))
    stream(root, "m-cashew-plantation")
    for text, words in (("{", "no JSON file"), ("[1]", "not laid out as"), ('{"01": 3}', "not laid out as")):
        path.write_text(text)
        with pytest.raises(UserError, match=f"band_stats.json is {words}"):
            partitions.read_published_stats(folder, geobench.SETS["m-cashew-plantation"], ("01",), 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"set": "m-eurosta"}, "no set 'm-eurosta'. GEO-Bench has: m-bigearthnet"),
        ({"set": "m-so2sat", "bands": ["thermal"]}, "m-so2sat has no band thermal. It has: sar_vh_real"),
        ({"set": "m-so2sat", "as_labeled": True}, "unknown key: as_labeled"),
        ({}, "lacks: set"),
    ],
)
def test_options_that_no_set_has(options, words):
    with pytest.raises(UserError, match=words):
        validate("m", DatasetConfig("geobench", options=options))


def test_keys_of_params_that_the_source_does_not_take():
    with pytest.raises(UserError, match="has chip, which source 'geobench' does not take"):
        validate("m", DatasetConfig("geobench", chip=4, options={"set": "m-eurosat"}))
    with pytest.raises(UserError, match="lacks: chip. Source 'osm_landuse' needs task, chip, block, splits"):
        validate("m", DatasetConfig("osm_landuse", task="classification"))
    with pytest.raises(UserError, match="source 'landuse' has none"):
        validate("m", dataclasses.replace(DatasetConfig("osm_landuse", options={"a": 1}), task="segmentation", chip=1, block=1,
                                       splits=(1, 1, 1)))  # fmt: skip
